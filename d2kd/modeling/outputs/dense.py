"""Outputs of dense, one-stage detectors: predictions for each anchor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.structures import Boxes
from torch import Tensor, nn

from ...utils.compat import box_tensors
from ..box_regression import integral
from .base import DetectorOutputs, OutputDict, OutputNotAvailable, lazy_property
from .capture import Call


class DenseOutputs(DetectorOutputs):
    """Outputs of a ``DenseDetector``: RetinaNet, and FCOS and GFL with one anchor per location."""

    captured_labels: tuple[list[Tensor], list[Boxes | Tensor]] | None = None
    """Captured output of a student's ``label_anchors``: labels and matched boxes of each image."""

    ground_truth = ("gt_instances", "captured_labels")

    computed_by = {"backbone": "features", "head": "predictions", "anchor_generator": "anchors"}

    @classmethod
    def hook_points(cls, detector: nn.Module) -> dict[str, nn.Module | Callable]:
        hook_points = {
            name: getattr(detector, name) for name in ("backbone", "head", "anchor_generator")
        }
        if hasattr(detector, "label_anchors"):  # otherwise the detector has no labels
            hook_points["label_anchors"] = detector.label_anchors
        return hook_points

    @staticmethod
    def _captured(calls: dict[str, list[Call]]) -> dict[str, Any]:
        ((_, features),) = calls["backbone"]
        ((_, predictions),) = calls["head"]
        captured = {"features": OutputDict(features), "predictions": predictions}
        for _, anchors in calls["anchor_generator"]:
            captured["anchors"] = anchors
        for (_, gt_instances), labels in calls.get("label_anchors", ()):
            captured |= {"gt_instances": gt_instances, "captured_labels": labels}
        return captured

    @lazy_property
    def predictions(self) -> tuple[list[Tensor], ...]:
        """Outputs of the head: for each type of prediction, a ``(N, A * k, Hi, Wi)`` map for each level."""
        return self.detector.head([self.features[f] for f in self.detector.head_in_features])

    @property
    def pred_logits(self) -> list[Tensor]:
        """For each level, ``(N, Hi * Wi * A, K)``, before the sigmoid."""
        return [permute_to_N_HWA_K(x, self.detector.num_classes) for x in self.predictions[0]]

    @property
    def pred_anchor_deltas(self) -> list[Tensor]:
        """For each level, ``(N, Hi * Wi * A, 4)``, deltas of the detector's ``box2box_transform``."""
        if hasattr(self.detector.head, "reg_max"):
            return [integral(x) for x in self.pred_distributions]
        return [permute_to_N_HWA_K(x, 4) for x in self.predictions[1]]

    def select_anchor_deltas(self, rows: Tensor) -> Tensor:
        """Return ``(P, 4)``, :attr:`pred_anchor_deltas` of some anchors; no others are decoded.

        Args:
            rows: ``(P,)``, indices in the anchors of all levels, of one image after the other.
        """
        if hasattr(self.detector.head, "reg_max"):
            return integral(torch.cat(self.pred_distributions, dim=1).flatten(0, 1)[rows])
        return torch.cat(self.pred_anchor_deltas, dim=1).flatten(0, 1)[rows]

    @property
    def pred_distributions(self) -> list[Tensor]:
        """For each level, ``(N, Hi * Wi * A, 4, n + 1)``, logits of each edge's distance in strides (GFL)."""
        if not hasattr(self.detector.head, "reg_max"):
            raise OutputNotAvailable(
                f"a {type(self.detector).__name__} has no 'pred_distributions'"
            )
        bins = self.detector.head.reg_max + 1
        return [
            permute_to_N_HWA_K(x, 4 * bins).unflatten(-1, (4, bins)) for x in self.predictions[1]
        ]

    @property
    def pred_centerness(self) -> list[Tensor]:
        """For each level, ``(N, Hi * Wi * A, 1)``, before the sigmoid (FCOS)."""
        if len(self.predictions) < 3:
            raise OutputNotAvailable(f"a {type(self.detector).__name__} has no 'pred_centerness'")
        return [permute_to_N_HWA_K(x, 1) for x in self.predictions[2]]

    @lazy_property
    def anchors(self) -> list[Boxes]:
        """Anchors of each level, in the order of the predictions."""
        return self.detector.anchor_generator(
            [self.features[f] for f in self.detector.head_in_features]
        )

    @lazy_property
    def labels(self) -> tuple[Tensor, Tensor]:
        """Labels by the detector's ``label_anchors``: ``gt_labels`` and ``matched_gt_boxes``."""
        labels, boxes = self.captured_labels or self.detector.label_anchors(
            self.anchors, self.gt_instances
        )
        return torch.stack(list(labels)), torch.stack(box_tensors(boxes))

    @property
    def gt_labels(self) -> Tensor:
        """``(N, sum Hi * Wi * A)`` in ``{-1, 0, …, K}``: -1 ignored, K background."""
        return self.labels[0]

    @property
    def matched_gt_boxes(self) -> Tensor:
        """``(N, sum Hi * Wi * A, 4)``; valid for foreground anchors alone."""
        return self.labels[1]
