"""PKD: the student's feature maps correlate with the teacher's, channel by channel."""

from __future__ import annotations

import logging
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.adapter import LevelChoice, is_power_of_two, top_levels
from ..utils.errors import InputError
from .base import Weight
from .features import FeatureLoss
from .functional import in_float32

logger = logging.getLogger(__name__)

RESIZES = ("student", "teacher")

EPSILON = 1e-6
"""Added to standard deviations, as in the published code."""

MIN_DEVIATION = 1e-4
"""A student's channel with a standard deviation below this part of 1 + |mean| gets no gradient."""


class PKDLoss(FeatureLoss):
    """Squared distance between feature maps that are standardised channel by channel.

        loss = sum_l 1/2 mean_nchw (z(A_l(S^l)) - z(T^l))^2,   z(F)_nchw = (F_nchw - mean_c) / (std_c + 1e-6)

    with the mean and the standard deviation (of M - 1) of a channel over its M = N H W cells of the batch, padding
    included. It is (M - 1) / M times 1 - r, the Pearson correlation of a channel, averaged over channels. It thus does
    not depend on the scale of either side, and there is no argument ``normalize``.

    PKD, "General Distillation Framework for Object Detectors via Pearson Correlation", NeurIPS 2022, arXiv 2207.02039,
    by the authors' code in MMRazor. Differences: a channel of the student that is constant over the batch
    gets no gradient. The published gradient is about 1e6 times that of other channels there. A level with one cell in
    the batch contributes 0, where the published value is NaN. Where channels differ, which the published code does not
    support, there is an adapter. Levels are matched by stride, not by index, unless pairs of levels are given.

    Statistics are those of the process's images, as published, so the value depends on how a batch is split.

    Reads: ``student.features``, ``teacher.features``; where the teacher's maps are resized, also ``teacher.images``.

    Args:
        levels: level names of the student, or ``{student level: teacher level}``. None: all matching levels, but not the
            topmost if it is from the FPN's top block: P3-P6 of a RetinaNet, P2-P5 of a Faster R-CNN, as published.
        resize: which side is resized at pairs of levels with other strides: "student", bilinearly to the teacher's grid,
            as published; or "teacher". Unless strides differ by powers of two, the teacher's maps are always resized.
        adapter: kind of adapter, see :class:`d2kd.layers.adapter.FeatureAdapter`.
        weight: a number or a schedule. None: 6 for two-stage students, 10 for others.

    Raises:
        InputError: if ``resize`` is unknown.

    Example:
        >>> from d2kd.testing import batch, sum_distill_losses, distiller, forward_losses, tiny_retinanet
        >>> model = distiller(PKDLoss, tiny_retinanet, same=True)
        >>> sum_distill_losses(forward_losses(model, batch())).item()  # the teacher is a copy
        0.0
    """

    def __init__(
        self,
        *,
        levels: LevelChoice = None,
        resize: str = "student",
        adapter: str = "auto",
        weight: Weight | None = None,
    ):
        super().__init__(levels=levels, adapter=adapter, normalize=False, weight=weight)
        if resize not in RESIZES:
            raise InputError("resize", resize, " or ".join(RESIZES))
        self.resize = resize

    def default_levels(self, student: nn.Module, teacher: nn.Module) -> dict[str, str]:
        levels = super().default_levels(student, teacher)
        topmost = list(levels)[-1]
        if len(levels) > 1 and topmost in top_levels(student.backbone):
            logger.info("PKD leaves out the topmost level %s", topmost)
            del levels[topmost]
        return levels

    def setup(self, student: nn.Module, teacher: nn.Module) -> None:
        super().setup(student, teacher)
        if self.weight is None:
            self.weight = 6.0 if hasattr(student, "roi_heads") else 10.0

    def forward(self, student, teacher) -> Tensor:
        return sum(
            correlation_distance(*pair) for pair in self.map_pairs(student, teacher).values()
        )

    def map_pairs(self, student, teacher) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the maps of each level as :class:`FeatureLoss` does, on the grid of the side that ``resize`` leaves."""
        pairs, strides = {}, self.level_strides
        whole = all(is_power_of_two(strides.ratio(level)) for level in self.levels)
        if self.resize == "teacher" or not whole:
            return super().map_pairs(student, teacher)
        for level, match in self.levels.items():
            features, target = student.features[level], teacher.features[match]
            if strides.is_resized(level):
                stride, other = strides.student[level], strides.teacher[level] / strides.scale
                features, target = crop_to_common_extent(features, target, stride, other)
                pairs[level] = resize_as(self.adapters.convs[level](features), target), target
            else:
                pairs[level] = self.adapters(features, target, level)
        return pairs


def crop_to_common_extent(
    features: Tensor, other: Tensor, stride: float, other_stride: float
) -> tuple[Tensor, Tensor]:
    """Return two maps ``(N, C, H, W)`` without the cells beyond the end of the other one, in pixels.

    Detectors may pad to different multiples.
    """
    ends = [
        min(a * stride, b * other_stride) for a, b in zip(features.shape[-2:], other.shape[-2:])
    ]
    (h, w), (other_h, other_w) = (
        [math.ceil(end / s) for end in ends] for s in (stride, other_stride)
    )
    return features[..., :h, :w], other[..., :other_h, :other_w]


@in_float32
def resize_as(features: Tensor, other: Tensor) -> Tensor:
    """Return a map ``(N, C, H, W)`` resized bilinearly to the grid of another one."""
    size = other.shape[-2:]
    if features.shape[-2:] == size:
        return features
    return F.interpolate(features, size, mode="bilinear", align_corners=False)


@in_float32
def correlation_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return half the mean squared difference of two standardised maps ``(N, C, H, W)``, a scalar."""
    return F.mse_loss(standardize(student), standardize(teacher)) / 2


def standardize(features: Tensor) -> Tensor:
    """Return a map ``(N, C, H, W)`` with mean 0 and standard deviation 1 of each channel over images and cells.

    Channels that are almost constant get no gradient.
    """
    cells = features.numel() // features.shape[1]
    deviation, mean = torch.std_mean(
        features, dim=(0, 2, 3), keepdim=True, correction=min(1, cells - 1)
    )
    standard = (features - mean) / (deviation + EPSILON)
    alive = deviation > MIN_DEVIATION * (1 + mean.abs())
    return standard.where(alive, standard.detach())
