"""Boxes as distances in strides, and distances as distributions."""

from __future__ import annotations

import torch
from detectron2.modeling.box_regression import Box2BoxTransformLinear
from torch import Tensor


class StrideTransform(Box2BoxTransformLinear):
    """FCOS's transform, distances from a box's centre to four edges in strides, for boxes of several strides.

    Args:
        anchor_scale: side of the source boxes in strides.
    """

    def __init__(self, anchor_scale: float):
        super().__init__(normalize_by_size=True)
        self.anchor_scale = anchor_scale

    def get_deltas(self, src_boxes: Tensor, target_boxes: Tensor) -> Tensor:
        """``(R, 4)`` distances of square source boxes' centres; a negative one lies beyond its edge."""
        return super().get_deltas(src_boxes, target_boxes) * self.anchor_scale

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """``(R, 4)`` boxes XYXY; negative distances count as 0."""
        return super().apply_deltas(deltas / self.anchor_scale, boxes)


def integral(logits: Tensor) -> Tensor:
    """The mean distance ``(…)`` float32 of distributions ``(…, n + 1)`` over 0 … n, before the softmax."""
    # A mean over bins loses in half precision what two detectors differ by.
    bins = torch.arange(logits.shape[-1], device=logits.device, dtype=torch.float32)
    return (logits.float().softmax(dim=-1) * bins).sum(dim=-1)
