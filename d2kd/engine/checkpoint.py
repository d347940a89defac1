"""A run's checkpoint is its student's: any Detectron2 tool reads the file, and the run continues from it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..classes import class_names, num_classes_of
from ..errors import InputError
from ..modeling import Distiller
from ..modeling.weights import CLASSES, check_names, local_path, read
from .random_state import random_state
from .run_info import written_whole


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


class StudentCheckpointer(DetectionCheckpointer):
    """Saves the student, and the state of whatever else is named, in one file.

    The file holds ``{"model": the student's, "classes": their names, "random": per process, **the others}``.
    It is written whole or not at all, and saving is collective, because every process has random state of
    its own.

    Args:
        model: the detector, or what it is trained in.
        save_dir: where to write.
        classes: names of the student's classes in its order; None: the file does not tell.
        checkpointables: what else to save, by key.
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

    def save(self, name: str, *, tag: bool = True, **extra: Any) -> None:
        """Write ``name.pth``. Every process must call this.

        Args:
            name: the file's name without its suffix.
            tag: whether this is where ``--resume`` goes on.
            extra: more to save, such as ``iteration``.
        """
        everyones_random_state = comm.gather(random_state())
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict(), "random": everyones_random_state}
        if self.classes is not None:
            data[CLASSES] = self.classes
        data |= {key: value.state_dict() for key, value in self.checkpointables.items()}
        file = Path(self.save_dir, f"{name}.pth")
        with written_whole(file) as temporary:
            torch.save(data | extra, temporary)
        self.logger.info("Saved %s", file)
        if tag:
            self.tag_last_checkpoint(file.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with written_whole(Path(self.save_dir, "last_checkpoint")) as temporary:
            temporary.write_text(last_filename_basename)

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

    def restore(self, weights: str) -> dict[str, Any]:
        """Load a checkpoint of this very run: the student strictly, then the others' states.

        Returns:
            what else the file holds.

        Raises:
            InputError: the file cannot be read, or is another run's.
        """
        checkpoint = read(weights)
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
