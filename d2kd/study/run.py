"""Trains one run of a study, or continues it, and leaves a record of what it was made from."""

from __future__ import annotations

import contextlib
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
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from detectron2.engine.hooks import CallbackHook
from omegaconf import DictConfig

from ..config import student_of, with_defaults, without_weights
from ..config.saving import save_config
from ..engine import Trainer, do_test
from ..engine.launch import pick_device
from ..engine.trainer import METRICS
from ..modeling.weights import fit, read, sha256
from ..utils.console import quiet
from ..utils.errors import InputError
from ..utils.io import read_json, read_rows, write_json
from .plan import Run
from .results import PREDICTIONS, average_precision

RECORD = "study.json"  # in a run's folder: what it was made from, and its row once it is finished
STDERR = "stderr.txt"  # in a run's folder: what its training wrote there


@dataclass(frozen=True)
class Measured:
    """What came out of a training.

    Attributes:
        metrics: COCOEvaluator's "bbox".
        parameters: of the student.
        seconds: inside training steps.
        weights: the file.
        peak_memory: bytes, while it was trained, by the process that needed most; None if unknown.
    """

    metrics: Mapping[str, float]
    parameters: int
    seconds: float
    weights: Path
    peak_memory: int | None = None


Report = Callable[[int, int], None]  # of (step, steps)


class Died(InputError):
    """A training's process that ended without a word to the user."""


def training_command(config_file: Path) -> list[str]:
    """The command line that trains a recipe, or continues its training."""
    command = [sys.executable, "-m", "d2kd", "train"]
    return [*command, "--config-file", str(config_file), "--resume"]


def train(config: DictConfig, test: str, report: Report) -> Measured:
    """Train or continue a recipe in this process, and look at the test split once."""
    with quiet():
        trainer = Trainer(config)
        trainer.resume_or_load(resume=True)
        if not trainer.finished:
            tell = CallbackHook(
                before_train=lambda trainer: report(trainer.start_iter, trainer.max_iter),
                after_step=lambda trainer: report(trainer.iter + 1, trainer.max_iter),
            )
            trainer.register_hooks([tell])
            trainer.train()
        del trainer
    return measure(config, test)


def train_apart(
    config: DictConfig, test: str, report: Report, count: int, gpu: str | None
) -> Iterator[None]:
    """:func:`train` by the training command in a process of its own, which ends with this one or with the iterator.

    Where the system cannot end a process with the one that started it, other than on Linux, it outlives a study that
    is killed by SIGKILL, and the command that continues the study must wait for it.

    Args:
        config, test, report: as of :func:`train`.
        count: threads.
        gpu: as CUDA_VISIBLE_DEVICES names it; None: whatever there is.

    Yields:
        now and then, while it trains. Returns what was measured.

    Raises:
        InputError: what the command said.
        Died: it said nothing of the kind.
    """
    folder = Path(config.train.output_dir)
    save_config(config, folder / "config.yaml")
    # What this process can import, that one can, too.
    path = os.pathsep.join(map(os.path.abspath, sys.path))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(count)}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    with open(folder / STDERR, "wb") as stderr:
        process = subprocess.Popen(
            training_command(folder / "config.yaml"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # the run's log has it
            stderr=stderr,
            env=environment,
            process_group=0,  # an interruption from the keyboard is this process's to pass on
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
    steps = config.train.max_iter
    try:
        while process.poll() is None:
            if (iteration := _last_iteration(folder / METRICS)) is not None:
                report(min(iteration + 1, steps), steps)  # its last line counts one more
            yield
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()
    if process.returncode != 0:
        raise _failure(folder, process.returncode)
    with threads(count):
        return measure(config, test)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, PyTorch computes with so many threads."""
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
        return json.loads(file.read().splitlines()[-1])["iteration"]  # or it is being written
    return None


def _failure(folder: Path, code: int) -> InputError:
    """The error that a training ended with."""
    lines = (folder / STDERR).read_text(errors="replace").splitlines() or [""]
    said = next((line for line in reversed(lines) if line.startswith("error: ")), None)
    if code == 2 and said is not None:
        return InputError.of_line(said.removeprefix("error: "))
    by = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}, {lines[-1]}"
    expected = f"a training that comes to its end; see {folder / STDERR} or the system's log"
    return Died(folder.name, by, expected)


def measure(config: DictConfig, test: str) -> Measured:
    """What a finished run has reached: its last weights on the test split, and what its record says."""
    folder = Path(config.train.output_dir)
    testing = with_defaults(config)
    testing.dataloader.test.dataset.names = test
    weights = folder / "model_final.pth"
    with quiet():
        student = instantiate(without_weights(student_of(testing.model)))
        student.to(pick_device(testing.train.device))
        checkpoint = read(str(weights))
        fit(student, checkpoint, str(weights))
        metrics = do_test(testing, student, output_dir=(folder / PREDICTIONS).parent)["bbox"]
    parts = read_rows(folder / "run.json")
    return Measured(
        metrics=metrics,
        parameters=sum(p.numel() for p in student.parameters()),
        seconds=checkpoint["trainer"]["seconds"],
        weights=weights,
        peak_memory=max((part.get("peak_memory") or 0 for part in parts), default=0) or None,
    )


def finished_row(folder: Path, key: str, test: str) -> dict[str, Any] | None:
    """The row of a run that needs no more work, with its paths as they are now; else None."""
    record = read_json(folder / RECORD)
    if (record.get("config_sha256"), record.get("dataset")) != (key, test) or not record["rows"]:
        return None
    [row] = record["rows"]
    for file in {"config", "weights", "log"} & row.keys():
        row[file] = str(folder / Path(row[file]).name)
    with contextlib.suppress(InputError, OSError):  # its weights are not here any more
        return row if sha256(row["weights"]) == row["weights_sha256"] else None
    return None


def train_into(
    folder: Path,
    run: Run,
    config: DictConfig,
    key: str,
    train: Callable[[Run, DictConfig, Report], Iterator[None]],
    report: Report,
    step_cost: Mapping[str, Any] | None = None,
) -> Iterator[None]:
    """Train a run, or continue it, and leave its record; what is refused before its first step leaves no trace.

    Args:
        folder: of the run.
        run: what to train.
        config, key: its recipe and fingerprint.
        train: how; it yields while it goes on, and returns what was measured.
        report: told of its progress.
        step_cost: of an equal-time run, what was measured for it.

    Yields:
        while it goes on. Returns the row.
    """
    record = {"schema": 1, "config_sha256": key, "dataset": run.test, "rows": []}
    aside = _make_room(folder, key)
    write_json(folder / RECORD, record)
    try:
        measured = yield from train(run, config, report)
    except BaseException as error:
        if not (folder / METRICS).exists() and not isinstance(error, Died):
            shutil.rmtree(folder, ignore_errors=True)
            if aside:
                aside.rename(folder)
            with contextlib.suppress(OSError):  # unless other runs are in it
                folder.parent.rmdir()
        raise
    peak = measured.peak_memory
    row = {
        "name": run.name,
        "method": run.method,
        "seed": run.seed,
        **average_precision(measured.metrics, MetadataCatalog.get(run.test).thing_classes),
        "parameters": measured.parameters,
        "seconds": round(measured.seconds, 3),
        "config": str(folder / "config.yaml"),
        "weights": str(measured.weights),
        "weights_sha256": sha256(str(measured.weights)),
        "teacher_sha256": _teacher_of(config),
        "log": str(folder / "log.txt"),
        "peak_memory_mib": None if peak is None else peak / 2**20,
        "step_cost": step_cost,
    }
    write_json(folder / RECORD, {**record, "rows": [row]})
    return row


def _teacher_of(config: DictConfig) -> str | None:
    """SHA-256 of the teacher's weights that a recipe names."""
    teacher = config.model.get("teacher") or {}
    with contextlib.suppress(InputError):  # it is not here any more
        return sha256(teacher["weights"]) if teacher.get("weights") else None


def _make_room(folder: Path, key: str) -> Path | None:
    """Move what was made from another recipe aside, and say where; it is neither to be continued nor lost."""
    same = read_json(folder / RECORD).get("config_sha256") == key
    if same or not folder.exists() or not any(folder.iterdir()):
        return None
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old{number}")).exists():
        number += 1
    return folder.rename(aside)
