"""What all families of detectors have in common."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn
from torch.profiler import record_function

from .capture import Call


class asked(functools.cached_property):
    """A property that computes itself once, without gradient, at its first reading."""

    def __get__(self, outputs: Any, owner: type | None = None) -> Any:
        if outputs is None:
            return self
        who = "student" if outputs.detector.training else "teacher"
        with record_function(f"d2kd/{who}.{self.attrname}"), torch.no_grad(), outputs.precision():
            return super().__get__(outputs, owner)


class Unreadable(LookupError):
    """A loss read what this family of detectors does not say."""


class Maps(dict):
    """Outputs by name, such as those of a backbone's levels.

    Raises:
        Unreadable: there is none of that name. A loss's own ``KeyError`` so stays its own.
    """

    def __missing__(self, name: str) -> Any:
        raise Unreadable(f"no {name!r} among {', '.join(map(str, self)) or 'none'}")


def precision_of(
    detector: nn.Module, dtype: torch.dtype | None
) -> contextlib.AbstractContextManager:
    """The context in which a detector computes in a precision of its own; None: in that of the context around."""
    if dtype is None:
        return contextlib.nullcontext()
    kind = detector.device.type
    if dtype == torch.float32:
        return torch.autocast(kind, enabled=False)
    return torch.autocast(kind, dtype)


def precision_around(detector: nn.Module) -> torch.dtype:
    """The precision in which a detector would compute here: autocast's, or else float32."""
    kind = detector.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32


class DetectorOutputs:
    """What every detector with a feature pyramid says.

    Args:
        detector: the module that speaks; ``eval()`` for a teacher.
        batched_inputs: Detectron2's list of dicts, images in the detector's own channel order.
        dtype: precision of what is asked; None: that of the context in which it is read.
        shared_sizes: (height, width) of each image as the detector that shares sees it; None: as here.
        captured: attributes known already, from the detector's own forward.
    """

    def __init__(
        self,
        detector: nn.Module,
        batched_inputs: list[dict],
        dtype: torch.dtype | None = None,
        shared_sizes: Sequence[tuple[int, int]] | None = None,
        **captured: Any,
    ):
        self.detector = detector
        self.batched_inputs = batched_inputs
        self.dtype, self.shared_sizes = dtype, shared_sizes
        self.__dict__.update(captured)

    def precision(self) -> contextlib.AbstractContextManager:
        """The context in which what is asked is computed."""
        return precision_of(self.detector, self.dtype)

    def __getattr__(self, name: str) -> Any:
        # Reached only where ordinary look-up failed.
        if name.startswith("__"):
            raise AttributeError(name)
        if hasattr(type(self), name):
            # A property that failed by an AttributeError, which Python takes for "no such attribute": fail as itself.
            return object.__getattribute__(self, name)
        kind = type(self.__dict__.get("detector")).__name__
        raise Unreadable(f"a {kind} has no {name!r} ({type(self).__name__})")

    @classmethod
    def joints(cls, detector: nn.Module) -> dict[str, nn.Module | Callable]:
        """The modules and methods, by name, to listen to while ``detector`` trains."""
        return {"backbone": detector.backbone}

    @classmethod
    def from_calls(
        cls,
        detector: nn.Module,
        batched_inputs: list[dict],
        calls: dict[str, list[Call]],
        taps: dict[str, list[Call]] | None = None,
    ) -> DetectorOutputs:
        """The outputs of a detector whose forward was captured at its :meth:`joints`."""
        tapped = {name: [output for _, output in heard] for name, heard in (taps or {}).items()}
        return cls(detector, batched_inputs, taps=Maps(tapped), **cls._captured(calls))

    @staticmethod
    def _captured(calls: dict[str, list[Call]]) -> dict[str, Any]:
        return {"features": Maps(calls["backbone"][0][1])}

    @property
    def shared(self) -> dict[str, Any]:
        """What a teacher must know of this student to judge the same things."""
        return {}

    def share(self, shared: Mapping[str, Any]) -> None:
        """Take over what another detector shares; what this family has no use for is left aside."""
        self.__dict__.update({k: v for k, v in shared.items() if hasattr(type(self), k)})

    @asked
    def images(self) -> ImageList:
        """The normalised, padded batch, ``(N, 3, H, W)``."""
        return self.detector.preprocess_image(self.batched_inputs)

    @asked
    def gt_instances(self) -> list[Instances]:
        """Ground truth of each image: ``gt_boxes`` XYXY in absolute pixels of the padded input."""
        device = self.detector.device
        return [x["instances"].to(device) for x in self.batched_inputs]

    @asked
    def features(self) -> dict[str, Tensor]:
        """Feature maps by level name, ``{"p3": (N, C, H, W), …}``; ``p<n>`` has stride ``2**n``."""
        return Maps(self.detector.backbone(self.images.tensor))
