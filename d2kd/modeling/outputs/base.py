"""Outputs that all families of detectors have."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn
from torch.profiler import record_function

from .capture import Call, capture


class lazy_property(functools.cached_property):
    """A cached property that is computed without gradient, in the precision of its object, when it is first read."""

    def __get__(self, outputs: Any, owner: type | None = None) -> Any:
        if outputs is None:
            return self
        who = "student" if outputs.detector.training else "teacher"
        with (
            record_function(f"d2kd/{who}.{self.attrname}"),
            torch.no_grad(),
            outputs.autocast_context(),
            outputs._record_taps(),
        ):
            return super().__get__(outputs, owner)


class OutputNotAvailable(LookupError):
    """A loss reads an output that this family of detectors does not have."""


class OutputDict(dict):
    """A dict of outputs, such as the feature maps of a backbone.

    Raises:
        OutputNotAvailable: there is no output of that name. It is not a ``KeyError``, which would indicate a bug in
            the loss.
    """

    def __missing__(self, name: str) -> Any:
        raise OutputNotAvailable(f"no {name!r} among {', '.join(map(str, self)) or 'none'}")


def autocast_context(
    detector: nn.Module, dtype: torch.dtype | None
) -> contextlib.AbstractContextManager:
    """Return the autocast context for a detector and a precision; None: no change."""
    if dtype is None:
        return contextlib.nullcontext()
    kind = detector.device.type
    if dtype == torch.float32:
        return torch.autocast(kind, enabled=False)
    return torch.autocast(kind, dtype)


def current_autocast_dtype(detector: nn.Module) -> torch.dtype:
    """Return the precision of a detector in the current context: autocast's, or float32 without autocast."""
    kind = detector.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32


class TeacherTaps(dict):
    """Outputs of the teacher's modules, recorded while the part of the teacher that has them is computed.

    Args:
        outputs: of the teacher.
        names: of the modules.
    """

    def __init__(self, outputs: DetectorOutputs, names: Sequence[str]):
        super().__init__()
        self.outputs, self.names, self.is_recording = outputs, tuple(names), False

    def __missing__(self, name: str) -> list[Any]:
        part = self.outputs.computed_by.get(name.partition(".")[0])
        if name not in self.names or part is None:
            raise OutputNotAvailable(f"no {name!r} among {', '.join(self.names) or 'none'}")
        getattr(self.outputs, part)
        return dict.__getitem__(self, name)

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Record the modules' calls while the block runs, which may contain such a block."""
        if self.is_recording or not self.names:
            yield
            return
        self.is_recording = True
        try:
            with capture({n: self.outputs.detector.get_submodule(n) for n in self.names}) as calls:
                yield
        finally:
            self.is_recording = False
        self.update({name: [x for _, x in found] for name, found in calls.items() if found})


class DetectorOutputs:
    """Outputs of any detector with a feature pyramid.

    Args:
        detector: the detector; in ``eval()`` for a teacher.
        batched_inputs: Detectron2's list of dicts, with images in the detector's channel order.
        dtype: precision of lazily computed outputs; None: that of the context in which they are read.
        student_image_sizes: (height, width) of the student's images, in whose pixels :meth:`set_region_boxes` gets the boxes;
            None: equal to those of ``batched_inputs``.
        teacher_taps: names of modules of a teacher, see :class:`TeacherTaps`.
        captured: attributes captured in the detector's forward.

    Attributes:
        is_labelled: whether the batch has ground truth. Its images either all have, or none has.
    """

    region_boxes: list[list[Boxes]] | None = None
    """For each stage, the boxes of the student's regions in each image; None for families without regions."""

    ground_truth: tuple[str, ...] = ("gt_instances",)
    """Names of captured attributes with ground truth."""

    mask_boxes: list[Boxes] | None = None
    """The boxes in each image for which the student's mask head was trained; None without a mask head."""

    computed_by: dict[str, str] = {"backbone": "features"}
    """Which output computes a submodule of the detector, by the submodule's name."""

    def __init__(
        self,
        detector: nn.Module,
        batched_inputs: list[dict],
        dtype: torch.dtype | None = None,
        student_image_sizes: Sequence[tuple[int, int]] | None = None,
        teacher_taps: Sequence[str] = (),
        **captured: Any,
    ):
        self.detector = detector
        self.batched_inputs = batched_inputs
        self.is_labelled = not any(x.get("unlabelled") for x in batched_inputs)
        self.dtype, self.student_image_sizes = dtype, student_image_sizes
        self.taps: OutputDict | TeacherTaps = TeacherTaps(self, teacher_taps)
        self.__dict__.update(captured)

    def _record_taps(self) -> contextlib.AbstractContextManager:
        return (
            self.taps.record() if isinstance(self.taps, TeacherTaps) else contextlib.nullcontext()
        )

    def autocast_context(self) -> contextlib.AbstractContextManager:
        """Return the context in which lazily computed outputs are computed."""
        return autocast_context(self.detector, self.dtype)

    def __getattr__(self, name: str) -> Any:
        # Called only after the ordinary look-up has failed.
        if name.startswith("__"):
            raise AttributeError(name)
        if hasattr(type(self), name):
            # A property raised AttributeError, which Python takes for "no such attribute": raise that error again.
            return object.__getattribute__(self, name)
        kind = type(self.__dict__.get("detector")).__name__
        raise OutputNotAvailable(f"a {kind} has no {name!r} ({type(self).__name__})")

    @classmethod
    def hook_points(cls, detector: nn.Module) -> dict[str, nn.Module | Callable]:
        """Return the modules and methods to record, by name, while ``detector`` trains."""
        return {"backbone": detector.backbone}

    @classmethod
    def from_calls(
        cls,
        detector: nn.Module,
        batched_inputs: list[dict],
        calls: dict[str, list[Call]],
        taps: dict[str, list[Call]] | None = None,
    ) -> DetectorOutputs:
        """Return the outputs of a detector from the calls that were recorded at its :meth:`hook_points`."""
        tapped = {name: [output for _, output in records] for name, records in (taps or {}).items()}
        outputs = cls(detector, batched_inputs, taps=OutputDict(tapped), **cls._captured(calls))
        if not outputs.is_labelled:  # the student's forward got no objects
            for name in outputs.ground_truth:
                outputs.__dict__.pop(name, None)
        return outputs

    @staticmethod
    def _captured(calls: dict[str, list[Call]]) -> dict[str, Any]:
        return {"features": OutputDict(calls["backbone"][0][1])}

    def set_region_boxes(
        self, boxes: list[list[Boxes]] | None, mask_boxes: list[Boxes] | None = None
    ) -> None:
        """Set the student's ``region_boxes`` and ``mask_boxes``; ignored by families without regions."""

    @lazy_property
    def images(self) -> ImageList:
        """The normalized, padded batch, ``(N, 3, H, W)``."""
        return self.detector.preprocess_image(self.batched_inputs)

    @lazy_property
    def gt_instances(self) -> list[Instances]:
        """Ground truth of each image: ``gt_boxes`` XYXY in absolute pixels of the padded input."""
        device = self.detector.device
        return [x.to(device) for x in self.input_instances]

    @property
    def input_instances(self) -> list[Instances]:
        """Ground truth of each image as the batch has it, usually on the CPU."""
        if not self.is_labelled:
            raise OutputNotAvailable("unlabelled images have no ground truth")
        return [x["instances"] for x in self.batched_inputs]

    @lazy_property
    def features(self) -> dict[str, Tensor]:
        """Feature maps by level name, ``{"p3": (N, C, H, W), …}``; ``p<n>`` has stride ``2**n``."""
        return OutputDict(self.detector.backbone(self.images.tensor))
