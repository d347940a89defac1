"""A frozen detector that the rest of PyTorch cannot see."""

from __future__ import annotations

from typing import Any

from torch import nn

from .outputs import DetectorOutputs, outputs_of
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

    Raises:
        InputError: the weights cannot be read or do not fit, or the detector's kind is unknown.
    """

    def __init__(
        self,
        detector: nn.Module,
        weights: str | None,
        image_format: str = "BGR",
        input_format: str | None = None,
    ):
        self.kind = outputs_of(detector)
        self.weights = weights
        if weights is not None:
            load_strict(detector, weights)
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

    def ask(self, batched_inputs: list[dict], **shared: Any) -> DetectorOutputs:
        """Outputs that compute themselves, without gradient, when they are read; nothing runs yet.

        Args:
            batched_inputs: the student's batch.
            shared: what the teacher needs of the student's outputs, such as ``region_boxes``; what this
                family has no use for is left aside.
        """
        captured = {key: value for key, value in shared.items() if hasattr(self.kind, key)}
        return self.kind(self.detector, self.own_inputs(batched_inputs), **captured)
