"""A frozen detector that the rest of PyTorch cannot see."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..classes import class_names, renamed
from .outputs import DetectorOutputs, check_classes, outputs_of
from .weights import load_strict, sha256


class Teacher:
    """A detector that is asked and never trained.

    Deliberately not an ``nn.Module``: assigned to a module it registers nothing, and so it is absent from
    ``state_dict()``, ``parameters()``, the optimizer, DDP and ``train()`` by construction.

    Args:
        detector: the detector; frozen and put in ``eval()`` here.
        weights: its checkpoint, any URI Detectron2 reads, loaded strictly. None: it has its weights already.
        image_format: channel order of the batches it will be given, "BGR" or "RGB": that of the student's
            data loader.
        input_format: channel order the detector wants. None: the detector's own ``input_format``, else
            ``image_format``.
        classes: names of its classes in its order, or the name of a data set that has them, for a student
            with other ones, see :class:`d2kd.classes.ClassMap`. None: its classes are the student's.
        aliases: {a name of ``classes``: the student's name for it}, where they differ.

    Raises:
        InputError: the weights cannot be read, do not fit or are of other classes, the detector's kind is
            unknown, or its classes are others than its outputs have room for.
    """

    def __init__(
        self,
        detector: nn.Module,
        weights: str | None,
        image_format: str = "BGR",
        input_format: str | None = None,
        classes: str | Iterable[str] | None = None,
        aliases: Mapping[str, str] | None = None,
    ):
        self.kind = outputs_of(detector)
        self.classes = None
        names = None if classes is None else class_names(classes, "teacher.classes")
        if names is not None:
            self.classes = renamed(names, aliases or {})
            check_classes("teacher", detector, self.classes)
        self.weights = weights
        if weights is not None:
            load_strict(detector, weights, names)
        self.detector = detector.eval().requires_grad_(False)
        wanted = input_format or getattr(detector, "input_format", None) or image_format
        self.flip_channels = wanted != image_format

    @property
    def weights_sha256(self) -> str | None:
        """SHA-256 of the weights file; None for a detector that was given with its weights."""
        return None if self.weights is None else sha256(self.weights)

    def own_inputs(self, batched_inputs: list[dict]) -> list[dict]:
        """The batch in the teacher's own channel order; its own statistics are applied when it is asked."""
        if not self.flip_channels:
            return batched_inputs
        return [{**x, "image": x["image"].flip(0)} for x in batched_inputs]

    def detect(self, batched_inputs: list[dict]) -> list[dict]:
        """What the teacher detects in the student's batch, as a detector in ``eval()`` returns it."""
        return self.detector(self.own_inputs(batched_inputs))

    def ask(self, batched_inputs: list[dict], **shared: Any) -> DetectorOutputs:
        """Outputs that compute themselves, without gradient, when they are read; nothing runs yet.

        Args:
            batched_inputs: the student's batch.
            shared: what the teacher needs of the student's outputs, such as ``region_boxes``; what this
                family has no use for is left aside.
        """
        outputs = self.kind(self.detector, self.own_inputs(batched_inputs))
        outputs.share(shared)
        return outputs
