"""Training of one run of a study, and the record of its recipe and results."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from detectron2.engine.hooks import CallbackHook
from omegaconf import DictConfig, OmegaConf

from ..comparison.detectors import detector_from_config, load_detector_for_classes
from ..comparison.labels import (
    UnlabelledImages,
    count_labels,
    given_thresholds,
    read_labels,
    write_labels,
)
from ..config import student_node, with_defaults, without_weights
from ..config.saving import save_config
from ..data import coco_dataset
from ..engine import Trainer, do_test
from ..engine.launch import pick_device
from ..engine.trainer import METRICS_FILE
from ..modeling.weights import file_sha256, load_checkpoint, load_state_dict_checked
from ..utils.console import ProgressCallback, suppress_output
from ..utils.errors import InputError
from ..utils.io import read_json, read_rows, write_json
from .plan import Labels, Run
from .results import PREDICTIONS, ap_metrics

RECORD = "study.json"  # in a run's folder: fingerprint of the recipe, and the row when finished
STDERR = "stderr.txt"  # in a run's folder: stderr of the training command


@dataclass(frozen=True)
class TrainingResult:
    """Results of a training.

    Attributes:
        metrics: "bbox" results of COCOEvaluator.
        mask_metrics: its "segm" results; None without masks.
        parameters: number of parameters of the student.
        seconds: time in training steps.
        weights: checkpoint file.
        peak_memory: peak memory of training in bytes, the maximum over processes; None if unknown.
        train_images: number of training images; None if unknown.
    """

    metrics: Mapping[str, float]
    parameters: int
    seconds: float
    weights: Path
    peak_memory: int | None = None
    train_images: int | None = None
    mask_metrics: Mapping[str, float] | None = None


class TrainingProcessDied(InputError):
    """The training process ended without an error message for the user."""


def training_command(config_file: Path) -> list[str]:
    """Return the command that trains a recipe or resumes its training."""
    command = [sys.executable, "-m", "d2kd", "train"]
    return [*command, "--config-file", str(config_file), "--resume"]


def train(config: DictConfig, test: str, progress: ProgressCallback) -> TrainingResult:
    """Train a recipe, or resume its training, in this process, and evaluate it on the test split."""
    with suppress_output():
        trainer = Trainer(config)
        trainer.resume_or_load(resume=True)
        if not trainer.finished:
            report_progress = CallbackHook(
                before_train=lambda trainer: progress(trainer.start_iter, trainer.max_iter),
                after_step=lambda trainer: progress(trainer.iter + 1, trainer.max_iter),
            )
            trainer.register_hooks([report_progress])
            trainer.train()
        del trainer
    return evaluate_run(config, test)


def train_in_subprocess(
    config: DictConfig, test: str, progress: ProgressCallback, count: int, gpu: str | None
) -> Iterator[None]:
    """Like :func:`train`, but with the training command in a subprocess. It ends when this process or the iterator does.

    Only on Linux does it also end when this process is killed by SIGKILL. On other systems it continues, and the study
    must not be resumed before it has ended.

    Args:
        config, test, progress: see :func:`train`.
        count: number of threads.
        gpu: value of CUDA_VISIBLE_DEVICES; default: unchanged.

    Yields:
        repeatedly during the training. Returns a :class:`TrainingResult`.

    Raises:
        InputError: the error of the command.
        TrainingProcessDied: the command failed without such an error.
    """
    folder = Path(config.train.output_dir)
    save_config(config, folder / "config.yaml")
    # The subprocess can import all that this process can.
    path = os.pathsep.join(map(os.path.abspath, sys.path))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(count)}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    with open(folder / STDERR, "wb") as stderr:
        process = subprocess.Popen(
            training_command(folder / "config.yaml"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # the log file has the same text
            stderr=stderr,
            env=environment,
            process_group=0,  # Ctrl-C reaches only this process, which ends the subprocess
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
    steps = config.train.max_iter
    try:
        while process.poll() is None:
            if (iteration := _last_iteration(folder / METRICS_FILE)) is not None:
                progress(min(iteration + 1, steps), steps)  # the last line has max_iter
            yield
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()
    if process.returncode != 0:
        raise _failure(folder, process.returncode)
    with torch_threads(count):
        return evaluate_run(config, test)


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Set the number of PyTorch threads inside the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1  # see prctl(2)


def _end_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _last_iteration(metrics: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError, LookupError), open(metrics, "rb") as file:
        file.seek(max(0, metrics.stat().st_size - 2**16))
        return json.loads(file.read().splitlines()[-1])["iteration"]  # fails on a partial line
    return None


def _failure(folder: Path, code: int) -> InputError:
    """Return the error of a failed training command."""
    lines = (folder / STDERR).read_text(errors="replace").splitlines() or [""]
    error_line = next((line for line in reversed(lines) if line.startswith("error: ")), None)
    if code == 2 and error_line is not None:
        return InputError.from_line(error_line.removeprefix("error: "))
    end = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}, {lines[-1]}"
    expected = f"a complete training; see {folder / STDERR} or the system's log"
    return TrainingProcessDied(folder.name, end, expected)


def evaluate_run(config: DictConfig, test: str) -> TrainingResult:
    """Evaluate the final weights of a run on the test split, and read the other results from its files."""
    folder = Path(config.train.output_dir)
    testing = with_defaults(config)
    testing.dataloader.test.dataset.names = test
    weights = folder / "model_final.pth"
    with suppress_output():
        student = instantiate(without_weights(student_node(testing.model)))
        student.to(pick_device(testing.train.device))
        checkpoint = load_checkpoint(str(weights))
        load_state_dict_checked(student, checkpoint, str(weights))
        metrics = do_test(testing, student, output_dir=(folder / PREDICTIONS).parent)
    parts = read_rows(folder / "run.json")
    return TrainingResult(
        metrics=metrics["bbox"],
        parameters=sum(p.numel() for p in student.parameters()),
        seconds=checkpoint["trainer"]["seconds"],
        weights=weights,
        peak_memory=max((part.get("peak_memory") or 0 for part in parts), default=0) or None,
        train_images=parts[-1].get("train_images") if parts else None,
        mask_metrics=metrics.get("segm"),
    )


def finished_row(folder: Path, key: str, test: str) -> dict[str, Any] | None:
    """Return the row of a finished run, with its current paths; None if the run is not finished."""
    record = read_json(folder / RECORD)
    if (record.get("config_sha256"), record.get("dataset")) != (key, test) or not record["rows"]:
        return None
    [row] = record["rows"]
    for file in {"config", "weights", "log"} & row.keys():
        row[file] = str(folder / Path(row[file]).name)
    with contextlib.suppress(InputError, OSError):  # the weights were deleted
        return row if file_sha256(row["weights"]) == row["weights_sha256"] else None
    return None


def train_run(
    folder: Path,
    run: Run,
    config: DictConfig,
    key: str,
    train: Callable[[Run, DictConfig, ProgressCallback], Iterator[None]],
    progress: ProgressCallback,
    step_cost: Mapping[str, Any] | None = None,
    pseudo_labelled: int = 0,
) -> Iterator[None]:
    """Train a run, or resume it, and write its record. If it fails before the first step, its folder is removed.

    Args:
        folder: folder of the run.
        run: the run.
        config, key: its recipe and fingerprint.
        train: generator that yields repeatedly during the training and returns a :class:`TrainingResult`.
        progress: progress callback.
        step_cost: measured step cost, only for an equal-time run.
        pseudo_labelled: number of training images that a detector has labelled, see :func:`add_labels`.

    Yields:
        repeatedly during the training. Returns the row.
    """
    record = {"schema": 1, "config_sha256": key, "dataset": run.test, "rows": []}
    renamed = _rename_other_run(folder, key)
    write_json(folder / RECORD, record)
    try:
        measured = yield from train(run, config, progress)
    except BaseException as error:
        if not (folder / METRICS_FILE).exists() and not isinstance(error, TrainingProcessDied):
            shutil.rmtree(folder, ignore_errors=True)
            if renamed:
                renamed.rename(folder)
            with contextlib.suppress(OSError):  # fails if other runs are in it
                folder.parent.rmdir()
        raise
    peak, masks = measured.peak_memory, measured.mask_metrics
    classes = MetadataCatalog.get(run.test).thing_classes
    row = {
        "name": run.name,
        "method": run.method,
        "seed": run.seed,
        **ap_metrics(measured.metrics, classes),
        **({} if masks is None else {"segm": ap_metrics(masks, classes)}),
        "parameters": measured.parameters,
        "seconds": round(measured.seconds, 3),
        "config": str(folder / "config.yaml"),
        "weights": str(measured.weights),
        "weights_sha256": file_sha256(str(measured.weights)),
        "teacher_sha256": _teacher_of(config),
        "log": str(folder / "log.txt"),
        "peak_memory_mib": None if peak is None else peak / 2**20,
        "step_cost": step_cost,
        "train_images": measured.train_images,
        "pseudo_labelled_images": pseudo_labelled,
    }
    write_json(folder / RECORD, {**record, "rows": [row]})
    return row


def add_labels(
    config: DictConfig, labels: Labels, detector: Mapping[str, Any], progress: ProgressCallback
) -> tuple[DictConfig, int, str]:
    """Add the labels of a run to its training data. They are written once, into the folder of their detector's run.

    Args:
        config: recipe of the run.
        labels: its labels.
        detector: row of the run whose final detector labels the images.
        progress: called with the number of labelled and of all images, unless the labels exist.

    Returns:
        the recipe with the labels, how many of its training images are labelled by the detector, and the number of
        images and boxes as text.

    Raises:
        InputError: the data set or the detector cannot be used.
    """
    name = f"labels_{labels.key(detector['weights_sha256'])[:12]}.json"
    file = Path(detector["weights"]).with_name(name)
    with suppress_output():
        images = UnlabelledImages.from_dataset(instantiate(labels.dataset))
        content = read_labels(file, images)
        if content is None:
            found = detector_from_config(detector["name"], detector["config"], detector["weights"])
            device = pick_device(config.train.device)
            ready = load_detector_for_classes(found, images.name, images.classes, device)
            thresholds = given_thresholds(ready.class_map.student, labels.min_score)
            content = write_labels(file, ready, images, thresholds, progress)
    config = copy.deepcopy(config)
    dataset = config.dataloader.train.dataset
    names = dataset.names
    added = L(coco_dataset)(name=str(file), json_file=str(file), image_root=images.root)
    dataset.names = [*names, added] if OmegaConf.is_list(names) else [names, added]
    with_boxes = len({one["image_id"] for one in content["annotations"]})
    used = with_boxes if dataset.get("filter_empty", True) else len(content["images"])
    return config, used, count_labels(content)


def _teacher_of(config: DictConfig) -> str | None:
    """Return the SHA-256 of the teacher's weights; None if there are none."""
    teacher = config.model.get("teacher") or {}
    with contextlib.suppress(InputError):  # the file was deleted
        return file_sha256(teacher["weights"]) if teacher.get("weights") else None


def _rename_other_run(folder: Path, key: str) -> Path | None:
    """Rename a folder made from another recipe, and return its new path; None if there is nothing to rename."""
    same = read_json(folder / RECORD).get("config_sha256") == key
    if same or not folder.exists() or not any(folder.iterdir()):
        return None
    number = 1
    while (renamed := folder.with_name(f"{folder.name}.old{number}")).exists():
        number += 1
    return folder.rename(renamed)
