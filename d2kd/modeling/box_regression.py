"""Boxes as distances in strides, and distances as distributions."""

from __future__ import annotations

import torch
from detectron2.modeling.box_regression import Box2BoxTransformLinear
from torch import Tensor


class Box2BoxTransformStride(Box2BoxTransformLinear):
    """FCOS's box transform with deltas in strides: the distances from an anchor's center to the four edges.

    Args:
        anchor_scale: side of the square anchors, in strides.
    """

    def __init__(self, anchor_scale: float):
        super().__init__(normalize_by_size=True)
        self.anchor_scale = anchor_scale

    def get_deltas(self, src_boxes: Tensor, target_boxes: Tensor) -> Tensor:
        """Return ``(R, 4)`` distances; a distance is negative if the center lies beyond that edge."""
        return super().get_deltas(src_boxes, target_boxes) * self.anchor_scale

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Return ``(R, 4)`` boxes XYXY; negative distances are clamped to 0."""
        return super().apply_deltas(deltas / self.anchor_scale, boxes)


def integral(logits: Tensor) -> Tensor:
    """Return the mean distance ``(…)``, float32, of distributions over 0 … n given by their logits ``(…, n + 1)``."""
    # In half precision, the mean's rounding error is as large as the difference between two detectors.
    bins = torch.arange(logits.shape[-1], device=logits.device, dtype=torch.float32)
    return (logits.float().softmax(dim=-1) * bins).sum(dim=-1)


def generalized_iou_loss(boxes: Tensor, targets: Tensor, eps: float = 1e-7) -> Tensor:
    """Return ``1 - GIoU`` (arXiv 1902.09630) of the rows of two tensors of boxes ``(P, 4)``, XYXY.

    It is equal to torchvision's ``generalized_box_iou_loss``, whose masks wait for the device ten times.
    """
    boxes, targets = (x if x.dtype == torch.float64 else x.float() for x in (boxes, targets))
    low, high = boxes.split(2, dim=1)
    target_low, target_high = targets.split(2, dim=1)
    sides = torch.min(high, target_high) - torch.max(low, target_low)
    intersection = torch.where((sides > 0).all(dim=1), _area(sides), 0)
    union = _area(high - low) + _area(target_high - target_low) - intersection
    enclosing = _area(torch.max(high, target_high) - torch.min(low, target_low))
    return 1 - (intersection / (union + eps) - (enclosing - union) / (enclosing + eps))


def _area(sides: Tensor) -> Tensor:
    return sides[:, 0] * sides[:, 1]


def select_class_deltas(deltas: Tensor, classes: Tensor) -> Tensor:
    """Return each row's deltas for its class, ``(P, 4)`` from ``(P, 4K)``; class-agnostic deltas are unchanged."""
    if deltas.shape[1] == 4:
        return deltas
    rows = torch.arange(len(deltas), device=deltas.device)
    return deltas.view(len(deltas), deltas.shape[1] // 4, 4)[rows, classes]
