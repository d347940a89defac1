"""Outputs of one-stage detectors: predictions for each anchor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from detectron2.structures import Boxes
from torch import Tensor, nn

from ...utils.compat import box_tensors
from ..meta_arch.gfl import integral
from .base import DetectorOutputs, Maps, Unreadable, asked
from .capture import Call


class DenseOutputs(DetectorOutputs):
    """What a ``DenseDetector`` says of its anchors: RetinaNet, and FCOS and GFL, whose anchors are points with a size."""

    own_labels: tuple[list[Tensor], list[Boxes | Tensor]] | None = None
    """What a student's ``label_anchors`` returned when it trained: for each image labels and matched boxes."""

    @classmethod
    def joints(cls, detector: nn.Module) -> dict[str, nn.Module | Callable]:
        joints = {
            name: getattr(detector, name) for name in ("backbone", "head", "anchor_generator")
        }
        if hasattr(detector, "label_anchors"):  # else there are no labels to read
            joints["label_anchors"] = detector.label_anchors
        return joints

    @staticmethod
    def _captured(calls: dict[str, list[Call]]) -> dict[str, Any]:
        ((_, features),) = calls["backbone"]
        ((_, predictions),) = calls["head"]
        captured = {"features": Maps(features), "predictions": predictions}
        for _, anchors in calls["anchor_generator"]:
            captured["anchors"] = anchors
        for (_, truth), labels in calls.get("label_anchors", ()):
            captured |= {"gt_instances": truth, "own_labels": labels}
        return captured

    @asked
    def predictions(self) -> tuple[list[Tensor], ...]:
        """The head's raw answer: for each kind, a ``(N, A * k, Hi, Wi)`` map for each level."""
        return self.detector.head([self.features[f] for f in self.detector.head_in_features])

    @property
    def pred_logits(self) -> list[Tensor]:
        """For each level ``(N, Hi * Wi * A, K)``, before the sigmoid."""
        return [by_anchor(x, self.detector.num_classes) for x in self.predictions[0]]

    @property
    def pred_anchor_deltas(self) -> list[Tensor]:
        """For each level ``(N, Hi * Wi * A, 4)``, for the detector's ``box2box_transform``."""
        if hasattr(self.detector.head, "reg_max"):
            return [integral(x) for x in self.pred_distributions]
        return [by_anchor(x, 4) for x in self.predictions[1]]

    @property
    def pred_distributions(self) -> list[Tensor]:
        """For each level ``(N, Hi * Wi * A, 4, n + 1)``, logits of each edge's distance in strides (GFL)."""
        if not hasattr(self.detector.head, "reg_max"):
            raise Unreadable(f"a {type(self.detector).__name__} has no 'pred_distributions'")
        bins = self.detector.head.reg_max + 1
        return [by_anchor(x, 4 * bins).unflatten(-1, (4, bins)) for x in self.predictions[1]]

    @property
    def pred_centerness(self) -> list[Tensor]:
        """For each level ``(N, Hi * Wi * A, 1)``, before the sigmoid (FCOS)."""
        if len(self.predictions) < 3:
            raise Unreadable(f"a {type(self.detector).__name__} has no 'pred_centerness'")
        return [by_anchor(x, 1) for x in self.predictions[2]]

    @asked
    def anchors(self) -> list[Boxes]:
        """Anchors of each level, in the predictions' order."""
        return self.detector.anchor_generator(
            [self.features[f] for f in self.detector.head_in_features]
        )

    @asked
    def labels(self) -> tuple[Tensor, Tensor]:
        """The detector's own labelling: ``gt_labels`` and ``matched_gt_boxes`` together."""
        labels, boxes = self.own_labels or self.detector.label_anchors(
            self.anchors, self.gt_instances
        )
        return torch.stack(list(labels)), torch.stack(box_tensors(boxes))

    @property
    def gt_labels(self) -> Tensor:
        """``(N, sum Hi * Wi * A)`` in ``{-1, 0, …, K}``: -1 ignored, K background."""
        return self.labels[0]

    @property
    def matched_gt_boxes(self) -> Tensor:
        """``(N, sum Hi * Wi * A, 4)``; means something for foreground anchors alone."""
        return self.labels[1]


def by_anchor(prediction: Tensor, size: int) -> Tensor:
    """``(N, A * size, H, W)`` to ``(N, H * W * A, size)``, a row for each anchor."""
    n, _, h, w = prediction.shape
    prediction = prediction.view(n, -1, size, h, w).permute(0, 3, 4, 1, 2)
    return prediction.reshape(n, -1, size)
