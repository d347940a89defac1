"""A frozen detector that the rest of PyTorch cannot see."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from detectron2.structures import Instances
from torch import nn

from ..structures.class_map import ClassMap, check_classes, class_names, num_classes_of, renamed
from ..utils.errors import InputError
from .outputs import DetectorOutputs, outputs_of, precision_around, precision_of
from .speed import compile_parts, fuse_norms, keep_weights
from .weights import load_strict, sha256

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
            with other ones, see :class:`d2kd.structures.class_map.ClassMap`. None: its classes are the student's.
        aliases: {a name of ``classes``: the student's name for it}, where they differ.
        scale: how many times larger its images are than the student's. The batch then has both, see
            :class:`d2kd.data.TwoScales`; levels are matched by their stride in the student's pixels.
        fuse_norms: fold its batch norms into the convolutions before the first question. Exact but for
            rounding; names of its weights change, which nothing saves.
        channels_last: keep its weights, and so compute its maps, channels last.
        compile: have ``torch.compile`` compile its backbone and heads at the first question.
        dtype: precision in which it answers and detects, "float32", "bfloat16" or "float16"; its convolutions' weights
            are kept in it. None: the student's, that of ``train.amp``.

    Raises:
        InputError: the weights cannot be read, do not fit or are of other classes, the detector's kind is
            unknown, or its classes are others than its outputs have room for; there is no such precision.
    """

    def __init__(
        self,
        detector: nn.Module,
        weights: str | None,
        image_format: str = "BGR",
        input_format: str | None = None,
        classes: str | Iterable[str] | None = None,
        aliases: Mapping[str, str] | None = None,
        scale: int = 1,
        fuse_norms: bool = False,
        channels_last: bool = False,
        compile: bool = False,
        dtype: str | None = None,
    ):
        if dtype not in (None, *DTYPES):
            raise InputError("teacher.dtype", dtype, " or ".join(DTYPES))
        self.kind = outputs_of(detector)
        self.classes = None
        names = None if classes is None else class_names(classes, "teacher.classes")
        if aliases and names is None:
            raise InputError("teacher.aliases", "no teacher.classes", "classes that they rename")
        if names is not None:
            self.classes = renamed(names, aliases or {})
            check_classes("teacher", detector, self.classes)
        self.weights = weights
        if weights is not None:
            load_strict(detector, weights, names)
        self.detector = detector.eval().requires_grad_(False)
        wanted = input_format or getattr(detector, "input_format", None) or image_format
        self.flip_channels = wanted != image_format
        if scale != int(scale) or scale < 1:
            raise InputError("teacher.scale", scale, "an integer of at least 1")
        self.scale = int(scale)
        self.dtype = DTYPES.get(dtype)
        self._to_do = {
            "fuse": fuse_norms,
            "keep": self.dtype not in (None, torch.float32),
            "channels_last": channels_last,
            "compile": compile,
        }

    @property
    def weights_sha256(self) -> str | None:
        """SHA-256 of the weights file; None for a detector that was given with its weights."""
        return None if self.weights is None else sha256(self.weights)

    def own_inputs(self, batched_inputs: list[dict]) -> list[dict]:
        """The batch in the teacher's own size and channel order; its own statistics are applied when it is asked.

        Of another size it has no ``instances`` nor ``proposals``, which are in the student's pixels.

        Raises:
            InputError: a teacher of larger images is given a batch without them.
        """
        if self.scale != 1:
            if not all("teacher_image" in x for x in batched_inputs):
                raise InputError(
                    "teacher.scale",
                    f"{self.scale}, but a batch without 'teacher_image'",
                    "mapper=L(TwoScales)(mapper=…, scale=…)",
                )
            names = {"instances", "proposals", "teacher_image"}
            batched_inputs = [
                {**{k: v for k, v in x.items() if k not in names}, "image": x["teacher_image"]}
                for x in batched_inputs
            ]
        if not self.flip_channels:
            return batched_inputs
        return [{**x, "image": x["image"].flip(0)} for x in batched_inputs]

    def detect(self, batched_inputs: list[dict]) -> list[dict]:
        """What the teacher detects in the student's batch, as a detector in ``eval()`` returns it."""
        with precision_of(self.detector, self.dtype):
            return self.detector(self.own_inputs(batched_inputs))

    def as_student(
        self, num_classes: int, class_map: ClassMap | None
    ) -> Callable[[list[dict]], list[dict]] | None:
        """:meth:`detect` in the student's classes, to be measured as the student is.

        Args:
            num_classes: the student's.
            class_map: None: the teacher's classes are the student's first ones.

        Returns:
            a function of batches, whose detections of other classes are left out; None, which is logged, where there
            is no telling which of the student's classes it knows.
        """
        if class_map is None:
            if (theirs := num_classes_of(self.detector)) <= num_classes:
                return self.detect
            reason = f"it has {theirs} classes, the student {num_classes}, and no names"
        elif class_map.pairs:
            return lambda batched_inputs: [
                {**seen, "instances": in_students_classes(seen["instances"], class_map)}
                for seen in self.detect(batched_inputs)
            ]
        else:
            reason = "none of its classes is the student's"
        logger.warning("The teacher's AP is not measured: %s", reason)
        return None

    def ask(self, batched_inputs: list[dict], **shared: Any) -> DetectorOutputs:
        """Outputs that compute themselves, without gradient, when they are read; nothing runs yet.

        Without a ``dtype`` of the teacher's own they do so in the precision of the context around this call, whichever
        loss reads them first.

        Args:
            batched_inputs: the student's batch.
            shared: what the teacher needs of the student's outputs, such as ``region_boxes``; what this
                family has no use for is left aside.

        Raises:
            InputError: its images are not ``scale`` times larger than the student's.
        """
        self._quicken()
        inputs = self.own_inputs(batched_inputs)
        dtype = self.dtype or precision_around(self.detector)
        sizes = None
        if self.scale != 1:
            sizes = [tuple(x["image"].shape[-2:]) for x in batched_inputs]
            for small, x in zip(sizes, inputs):
                full = tuple(x["image"].shape[-2:])
                if any(abs(a - b * self.scale) >= self.scale for a, b in zip(full, small)):
                    found = f"{self.scale}, but an image of {full} beside the student's of {small}"
                    raise InputError("teacher.scale", found, "the scale of the mapper")
        outputs = self.kind(self.detector, inputs, dtype=dtype, shared_sizes=sizes)
        outputs.share(shared)
        return outputs

    def _quicken(self) -> None:
        """What makes the detector faster, once, when its weights are loaded, inherited and in their place."""
        if self._to_do.pop("fuse", False):
            fuse_norms(self.detector)
        if self._to_do.pop("keep", False):
            keep_weights(self.detector, self.dtype)
        if self._to_do.pop("channels_last", False):
            self.detector.to(memory_format=torch.channels_last)
        if self._to_do.pop("compile", False):
            compile_parts(self.detector)


def in_students_classes(detections: Instances, class_map: ClassMap) -> Instances:
    """A teacher's detections by the student's numbers, without those of classes that the student does not know."""
    labels = class_map.student_labels(detections.pred_classes)
    known = detections[labels >= 0]
    known.pred_classes = labels[labels >= 0]
    return known
