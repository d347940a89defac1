"""A run's checkpoint is its student's: any Detectron2 tool reads the file, and the run continues from it."""

from __future__ import annotations

import contextlib
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..modeling import Distiller, Teacher
from ..modeling.weights import CLASSES, check_names, local_path, read
from ..structures.class_map import class_names, num_classes_of
from ..utils.errors import InputError
from ..utils.io import explaining_full_disk, write_text, written_whole
from ..utils.random_state import random_state


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DDP, or the module itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def student_of(model: nn.Module) -> nn.Module:
    """The detector being trained, inside DDP and a :class:`Distiller` or bare."""
    model = unwrapped(model)
    return model.student if isinstance(model, Distiller) else model


def learned_classes(student: nn.Module, names: list[str]) -> tuple[str, ...] | None:
    """Names of a detector's classes in its order, if the data sets it learns from say as many."""
    with contextlib.suppress(InputError, AttributeError):
        classes = class_names(names)
        if len(classes) == num_classes_of(student):
            return classes
    return None


def teacher_classes(teacher: Teacher, student: Sequence[str] | None) -> tuple[str, ...] | None:
    """Names of a teacher's classes in its order: those it was given, those in its file, or the student's first ones.

    Raises:
        InputError: its file cannot be read.
    """
    if teacher.classes is not None:
        return teacher.classes
    count = num_classes_of(teacher.detector)
    names = None if teacher.weights is None else read(teacher.weights).get(CLASSES)
    names = names or (student or ())[:count]
    return tuple(names) if len(names) == count else None


class StudentCheckpointer(DetectionCheckpointer):
    """Saves the student, and the state of whatever else is named, in one file.

    The file holds ``{"model": the student's, "classes": their names, "processes": of each, **the others}``, in
    tensors and Python's scalars alone: ``torch.load(weights_only=True)`` reads it. It is written whole or not
    at all, and saving is collective, because every process has a state of its own, see :meth:`process_state`.

    Args:
        model: the detector, or what it is trained in.
        save_dir: where to write.
        classes: names of the student's classes in its order; None: the file does not tell.
        checkpointables: what else to save, by key.

    Attributes:
        begun: when the run began, as a file's time in ns: checkpoints that are older are another run's.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        classes: Sequence[str] | None = None,
        **checkpointables: Any,
    ):
        super().__init__(student_of(model), save_dir, **checkpointables)
        self.classes = None if classes is None else list(classes)
        self.begun = 0

    def save(self, name: str, *, tag: bool = True, **extra: Any) -> None:
        """Write ``name.pth``. Every process must call this.

        Args:
            name: the file's name without its suffix.
            tag: whether this is where ``--resume`` goes on.
            extra: more to save, such as ``iteration``.
        """
        processes = comm.gather(self.process_state())
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict(), "processes": processes}
        if self.classes is not None:
            data[CLASSES] = self.classes
        data |= {key: value.state_dict() for key, value in self.checkpointables.items()}
        data = plain(data | extra)
        file = Path(self.save_dir, f"{name}.pth")
        with explaining_full_disk(file):
            with written_whole(file) as temporary, temporary.open("wb") as stream:
                torch.save(data, stream)
            if tag:
                self.tag_last_checkpoint(file.name)
        self.logger.info("Saved %s", file)

    def process_state(self) -> dict[str, Any]:
        """What this process has of its own: its generators, a dense detector's running mean of its foreground."""
        state = {"random": random_state()}
        if hasattr(self.model, NORMALIZER):
            state[NORMALIZER] = getattr(self.model, NORMALIZER)
        return state

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        write_text(Path(self.save_dir, "last_checkpoint"), last_filename_basename)

    def load_initial(self, weights: str) -> None:
        """Start the student from whatever fits by name and shape: a backbone, another detector.

        Raises:
            InputError: the file cannot be read, or nothing in it fits.
        """
        incompatible = self._load_model(read(weights))
        parameters = {name for name, _ in self.model.named_parameters()}
        unmet = {*incompatible.missing_keys, *(key for key, *_ in incompatible.incorrect_shapes)}
        if parameters <= unmet:
            raise InputError(
                weights,
                f"none of its tensors fits this {type(self.model).__name__}",
                "weights of its backbone or of the whole detector",
            )
        self._log_incompatible_keys(incompatible)
        self.logger.info(
            "%s: %d of %d parameters loaded", weights, len(parameters - unmet), len(parameters)
        )

    def last(self) -> str | None:
        """The checkpoint to resume from, if there is one.

        Raises:
            InputError: ``last_checkpoint`` names a file that is not there.
        """
        if not self.has_checkpoint():
            return None
        return local_path(self.get_checkpoint_file())

    def read_last(self) -> tuple[str, dict[str, Any]] | None:
        """The newest checkpoint that is whole, with its content; those that are not are named in a warning.

        Raises:
            InputError: ``last_checkpoint`` names a file that is not there, or none is whole.
        """
        last = self.last()
        if last is None:
            return None
        for file in [last, *self.before(last)]:
            try:
                return file, read(file)
            except InputError as error:
                self.logger.warning("%s. Looking at the checkpoint before it", error)
        raise InputError(
            last, "cannot be read, nor is there one before it", "a whole checkpoint to go on from"
        )

    def before(self, last: str) -> list[str]:
        """This run's periodic checkpoints that are older than one, the newest first."""
        ages = {
            (file.stat().st_mtime_ns, file.name): str(file)
            for file in Path(self.save_dir).glob("model_*.pth")
            if re.fullmatch(r"model_\d+", file.stem)
        }
        than = (Path(last).stat().st_mtime_ns, Path(last).name)
        return [ages[age] for age in sorted(ages, reverse=True) if (self.begun,) <= age < than]

    def restore(self, weights: str, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Load a checkpoint of this very run: the student strictly, then the others' states.

        Args:
            weights: the file's name.
            checkpoint: what was read from it.

        Returns:
            what else it holds.

        Raises:
            InputError: it is another run's.
        """
        check_names(checkpoint, weights, self.classes)
        incompatible = self._load_model(checkpoint)
        unmet = [*incompatible.missing_keys, *(key for key, *_ in incompatible.incorrect_shapes)]
        if unmet:
            raise InputError(
                weights, f"{unmet[0]} is missing or of another shape", "a checkpoint of this recipe"
            )
        for key, value in self.checkpointables.items():
            if key not in checkpoint:
                self.logger.warning("%s holds no %r: that starts anew", weights, key)
                continue
            try:
                value.load_state_dict(checkpoint.pop(key))
            except (KeyError, RuntimeError, ValueError, TypeError) as error:
                raise InputError(
                    weights, f"its {key!r} does not fit ({error})", "a checkpoint of this recipe"
                ) from error
        return checkpoint


FINAL = "model_final.pth"
"""The state at the end of a run."""

NORMALIZER = "loss_normalizer"
"""The attribute in which Detectron2's dense detectors keep it, which their own state lacks."""


_SCALARS = (bool, int, float, str, bytes, type(None))


def plain(value: Any, name: str = "checkpoint") -> Any:
    """The value itself, NumPy's scalars in it replaced by Python's.

    Raises:
        InputError: something in it is more than tensors and Python's scalars, so that reading it would need trust.
    """
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (dict, OrderedDict, list):
        # In place, for a state_dict has the versions of its modules beside its items.
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            value[key] = plain(item, f"{name}.{key}")
    elif type(value) is tuple:
        return tuple(plain(item, f"{name}.{i}") for i, item in enumerate(value))
    elif not isinstance(value, torch.Tensor) and type(value) not in _SCALARS:
        raise InputError(name, f"a {type(value).__name__}", "tensors and Python's scalars")
    return value
