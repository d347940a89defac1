"""Trains one run of a study, or continues it, and leaves a record of what it was made from."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.engine.hooks import CallbackHook
from omegaconf import DictConfig

from ..engine import Trainer, do_test
from ..engine.memory import Peak
from ..engine.run_info import write_json
from ..errors import InputError
from ..modeling.weights import sha256
from .console import quiet
from .plan import Run
from .results import PREDICTIONS, average_precision

RECORD = "study.json"  # in a run's folder: what it was made from, and its row once it is finished


@dataclass(frozen=True)
class Measured:
    """What came out of a training.

    Attributes:
        metrics: COCOEvaluator's "bbox".
        parameters: of the student.
        seconds: inside training steps.
        weights: the file.
        peak_memory: bytes, while it was trained, by the last process if there were several; None if unknown.
    """

    metrics: Mapping[str, float]
    parameters: int
    seconds: float
    weights: Path
    peak_memory: int | None = None


Report = Callable[[int, int], None]  # of (step, steps): before the first and after each


def train(config: DictConfig, test: str, report: Report) -> Measured:
    """Train or continue a recipe, and look at the test split once."""
    trainer = Trainer(config)
    trainer.resume_or_load(resume=True)
    peak = None
    if not trainer.finished:
        peak = Peak(trainer.device)
        tell = CallbackHook(
            before_train=lambda trainer: report(trainer.start_iter, trainer.max_iter),
            after_step=lambda trainer: report(trainer.iter + 1, trainer.max_iter),
        )
        trainer.register_hooks([tell])
        trainer.train()
        peak = peak.bytes
    folder = Path(config.train.output_dir)
    testing = copy.deepcopy(trainer.cfg)
    testing.dataloader.test.dataset.names = test
    student = getattr(trainer.model, "student", trainer.model)
    return Measured(
        metrics=do_test(testing, student, output_dir=(folder / PREDICTIONS).parent)["bbox"],
        parameters=sum(p.numel() for p in student.parameters()),
        seconds=trainer.seconds,
        weights=folder / "model_final.pth",
        peak_memory=peak,
    )


def finished_row(folder: Path, key: str, test: str) -> dict[str, Any] | None:
    """The row of a run that needs no more work, with its paths as they are now; else None."""
    try:
        record = json.loads((folder / RECORD).read_text())
        if (record["config_sha256"], record["dataset"]) != (key, test):
            return None
        [row] = record["rows"]
        for file in {"config", "weights", "log"} & row.keys():
            row[file] = str(folder / Path(row[file]).name)
        return row if sha256(row["weights"]) == row["weights_sha256"] else None
    except (OSError, ValueError, KeyError, TypeError, InputError):
        return None


def train_into(
    folder: Path, run: Run, config: DictConfig, key: str, train: Callable, line: Report
) -> dict[str, Any]:
    """Train a run, or continue it, and leave its record; what fails before its first step leaves no trace."""
    record = {"schema": 1, "config_sha256": key, "dataset": run.test, "rows": []}
    aside = _make_room(folder, key)

    def report(step: int, steps: int) -> None:
        if not (folder / RECORD).exists():
            write_json(folder / RECORD, record)
        line(step, steps)

    try:
        with quiet():
            measured = train(config, run.test, report)
    except BaseException:
        if not (folder / RECORD).exists():
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
    }
    write_json(folder / RECORD, {**record, "rows": [row]})
    return row


def _teacher_of(config: DictConfig) -> str | None:
    """SHA-256 of the teacher's weights that a recipe names."""
    teacher = config.model.get("teacher") or {}
    weights = teacher.get("weights")
    return sha256(weights) if weights and Path(weights).is_file() else None


def _make_room(folder: Path, key: str) -> Path | None:
    """Move what was made from another recipe aside, and say where; it is neither to be continued nor lost."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if json.loads((folder / RECORD).read_text())["config_sha256"] == key:
            return None
    if not folder.exists() or not any(folder.iterdir()):
        return None
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old{number}")).exists():
        number += 1
    return folder.rename(aside)
