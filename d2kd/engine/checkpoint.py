"""Checkpoints of a run, which any Detectron2 tool reads as the student's, and from which the run is resumed."""

from __future__ import annotations

import contextlib
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..modeling import Distiller, Teacher
from ..modeling.weights import (
    CLASSES_KEY,
    check_class_names,
    load_checkpoint,
    local_path,
    without_wrapper,
)
from ..structures.class_map import class_names, num_classes_of
from ..utils.errors import InputError
from ..utils.io import atomic_write, report_full_disk, write_text
from ..utils.random_state import random_state
from .ema import EMA


def unwrap_ddp(model: nn.Module) -> nn.Module:
    """Return the module inside DDP, or the module itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def get_student(model: nn.Module) -> nn.Module:
    """Return the detector that is trained, without DDP and :class:`Distiller` around it."""
    model = unwrap_ddp(model)
    return model.student if isinstance(model, Distiller) else model


def training_class_names(student: nn.Module, names: list[str]) -> tuple[str, ...] | None:
    """Return the class names of the training data sets; None if their number is not that of the detector's classes."""
    with contextlib.suppress(InputError, AttributeError):
        classes = class_names(names)
        if len(classes) == num_classes_of(student):
            return classes
    return None


def teacher_class_names(teacher: Teacher, student: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the names of a teacher's classes in its order, or None.

    They are its ``classes``, those in its weights file, or otherwise the student's first ones.

    Raises:
        InputError: the weights file cannot be read.
    """
    if teacher.classes is not None:
        return teacher.classes
    count = num_classes_of(teacher.detector)
    names = None if teacher.weights is None else load_checkpoint(teacher.weights).get(CLASSES_KEY)
    names = names or (student or ())[:count]
    return tuple(names) if len(names) == count else None


class StudentCheckpointer(DetectionCheckpointer):
    """A checkpointer of the student and the states of other objects.

    The file has ``{"model": the student's state dict, "classes": class names, "processes": a state per process,
    **other states}``. It consists of tensors and Python's scalars, so that ``torch.load(weights_only=True)`` reads
    it, and is written atomically. Saving is a collective operation, see :meth:`process_state`.

    Args:
        model: the detector, also inside a :class:`Distiller` or DDP.
        save_dir: output folder.
        classes: names of the student's classes in its order; None: the file has no "classes".
        ema: an average of the student's weights. It is then the "model" of the file, and the student "trained_model".
        before_save: called in all processes before a file is written; it raises if the state must not be saved.
        checkpointables: other objects to save, by key.

    Attributes:
        start_time: start time of the run, as a file's modification time in ns; older checkpoints are another run's.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        classes: Sequence[str] | None = None,
        ema: EMA | None = None,
        before_save: Callable[[], None] = lambda: None,
        **checkpointables: Any,
    ):
        super().__init__(get_student(model), save_dir, **checkpointables)
        self.classes = None if classes is None else list(classes)
        self.start_time = 0
        self._ema, self._before_save = ema, before_save

    def save(self, name: str, *, tag: bool = True, **extra: Any) -> None:
        """Write ``name.pth``. This is a collective operation.

        Args:
            name: the file's name without its suffix.
            tag: whether ``--resume`` continues from this file.
            extra: further values to save, such as ``iteration``.
        """
        self._before_save()
        processes = comm.gather(self.process_state())
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict(), "processes": processes}
        if self._ema is not None:
            data[TRAINED_MODEL], data["model"] = data["model"], self._ema.detector.state_dict()
            data["ema"] = self._ema.state_dict()
        if self.classes is not None:
            data[CLASSES_KEY] = self.classes
        data |= {key: value.state_dict() for key, value in self.checkpointables.items()}
        data = to_builtin_types(data | extra)
        file = Path(self.save_dir, f"{name}.pth")
        with report_full_disk(file):
            with atomic_write(file) as temporary, temporary.open("wb") as stream:
                torch.save(data, stream)
            if tag:
                self.tag_last_checkpoint(file.name)
        self.logger.info("Saved %s", file)

    def process_state(self) -> dict[str, Any]:
        """Return the state that differs between processes: random state, and a dense detector's loss normalizer."""
        state = {"random": random_state()}
        if hasattr(self.model, LOSS_NORMALIZER):
            state[LOSS_NORMALIZER] = getattr(self.model, LOSS_NORMALIZER)
        return state

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        write_text(Path(self.save_dir, "last_checkpoint"), last_filename_basename)

    def load_initial(self, weights: str) -> None:
        """Initialize the student with weights of equal name and shape, such as a backbone's or another detector's.

        Raises:
            InputError: the file cannot be read, or none of its weights fits.
        """
        checkpoint = without_wrapper(load_checkpoint(weights), self.model, weights)
        incompatible = self._load_model(checkpoint)
        parameters = {name for name, _ in self.model.named_parameters()}
        missing = {*incompatible.missing_keys, *(key for key, *_ in incompatible.incorrect_shapes)}
        if parameters <= missing:
            raise InputError(
                weights,
                f"none of its tensors fits this {type(self.model).__name__}",
                "weights of its backbone or of the whole detector",
            )
        self._log_incompatible_keys(incompatible)
        self.logger.info(
            "%s: %d of %d parameters loaded", weights, len(parameters - missing), len(parameters)
        )

    def last_checkpoint_file(self) -> str | None:
        """Return the file of the last checkpoint, or None.

        Raises:
            InputError: ``last_checkpoint`` names a file that does not exist.
        """
        if not self.has_checkpoint():
            return None
        return local_path(self.get_checkpoint_file())

    def load_last_checkpoint(self) -> tuple[str, dict[str, Any]] | None:
        """Return the newest readable checkpoint with its content, or None; unreadable ones are logged.

        Raises:
            InputError: ``last_checkpoint`` names a file that does not exist, or no checkpoint can be read.
        """
        last = self.last_checkpoint_file()
        if last is None:
            return None
        for file in [last, *self.older_checkpoints(last)]:
            try:
                return file, load_checkpoint(file)
            except InputError as error:
                self.logger.warning("%s. Trying the one before it", error)
        raise InputError(
            last, "cannot be read, nor is there one before it", "a whole checkpoint to resume from"
        )

    def older_checkpoints(self, last: str) -> list[str]:
        """Return this run's periodic checkpoints that are older than ``last_checkpoint_file``, the newest first."""
        files = {
            (file.stat().st_mtime_ns, file.name): str(file)
            for file in Path(self.save_dir).glob("model_*.pth")
            if re.fullmatch(r"model_\d+", file.stem)
        }
        newest = (Path(last).stat().st_mtime_ns, Path(last).name)
        times = [time for time in files if (self.start_time,) <= time < newest]
        return [files[time] for time in sorted(times, reverse=True)]

    def restore(self, weights: str, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Resume from a checkpoint of this run: load the student strictly, and the states of the other objects.

        Args:
            weights: name of the file.
            checkpoint: its content.

        Returns:
            the remaining entries.

        Raises:
            InputError: the checkpoint does not fit this recipe.
        """
        check_class_names(checkpoint, weights, self.classes)
        averaged = checkpoint["model"]
        if TRAINED_MODEL in checkpoint:
            checkpoint["model"] = checkpoint.pop(TRAINED_MODEL)
        incompatible = self._load_model(checkpoint)
        unmet = [*incompatible.missing_keys, *(key for key, *_ in incompatible.incorrect_shapes)]
        if unmet:
            raise InputError(
                weights, f"{unmet[0]} is missing or of another shape", "a checkpoint of this recipe"
            )
        state = checkpoint.pop("ema", None)
        if self._ema is not None and state is None:
            self.logger.warning("%s has no average weights: the average begins anew", weights)
        elif self._ema is not None:
            self._ema.detector.load_state_dict(averaged)
            self._ema.load_state_dict(state)
        elif state is not None:
            self.logger.warning("train.ema is off: the average weights in %s are not used", weights)
        for key, value in self.checkpointables.items():
            if key not in checkpoint:
                self.logger.warning("%s has no %r: its initial state is used", weights, key)
                continue
            try:
                value.load_state_dict(checkpoint.pop(key))
            except (KeyError, RuntimeError, ValueError, TypeError) as error:
                raise InputError(
                    weights, f"its {key!r} does not fit ({error})", "a checkpoint of this recipe"
                ) from error
        return checkpoint


TRAINED_MODEL = "trained_model"
"""Key, in the checkpoint of a run with ``train.ema``, of the weights that are trained; "model" has their average."""

FINAL_CHECKPOINT = "model_final.pth"
"""File name of the checkpoint at the end of a run."""

LOSS_NORMALIZER = "loss_normalizer"
"""Name of the attribute with the loss normalizer of Detectron2's dense detectors, which is not in their state dict."""


_SCALARS = (bool, int, float, str, bytes, type(None))


def to_builtin_types(value: Any, name: str = "checkpoint") -> Any:
    """Replace NumPy's scalars in a value by Python's, in dicts and lists in place.

    Raises:
        InputError: it contains other types than tensors and Python's, which ``weights_only=True`` would not read.
    """
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (dict, OrderedDict, list):
        # In place, because a state_dict has its modules' versions in an attribute.
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            value[key] = to_builtin_types(item, f"{name}.{key}")
    elif type(value) is tuple:
        return tuple(to_builtin_types(item, f"{name}.{i}") for i, item in enumerate(value))
    elif not isinstance(value, torch.Tensor) and type(value) not in _SCALARS:
        raise InputError(name, f"a {type(value).__name__}", "tensors and Python's scalars")
    return value


def check_same_checkpoint(last: tuple[str, dict] | None) -> None:
    """Check that all processes resume from the same checkpoint; otherwise their weights would differ silently.

    Raises:
        InputError: the checkpoints differ.
    """
    found = "no checkpoint" if last is None else Path(last[0]).name
    for rank, other in enumerate(comm.all_gather(found)):
        if other != found:
            raise InputError(
                "--resume",
                f"{found} in process {comm.get_rank()}, {other} in process {rank}",
                "one output folder that all processes see",
            )


def redistribute_normalizer(states: Sequence[dict], processes: int) -> dict[str, Any]:
    """Return the state of each process if their number has changed, with the same total batch size.

    A loss normalizer counts the foreground of its process's part of the batch, so that their sum is preserved.
    """
    values = [state[LOSS_NORMALIZER] for state in states if LOSS_NORMALIZER in state]
    return {LOSS_NORMALIZER: sum(values) / processes} if values else {}
