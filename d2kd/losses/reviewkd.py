"""ReviewKD: coarse levels of the student are reviewed with finer ones before they are compared with the teacher's."""

from __future__ import annotations

import logging
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.adapter import LevelChoice
from ..utils.errors import InputError
from .base import Weight
from .features import FeatureLoss
from .functional import in_float32

logger = logging.getLogger(__name__)

POOLED_SIZES = (4, 2, 1)


class ReviewKDLoss(FeatureLoss):
    """Distance of feature maps in several resolutions, after fusion of the student's levels from coarse to fine.

        loss = sum_l h(out_l, T^l / r_l),   out_l = norm(conv3x3(x_l)),   x_l = a_l norm(conv1x1(S^l)) + b_l up(x_{l+1})

    with the weights (a, b) of each cell from a sigmoid of a convolution of both parts, see :class:`ReviewBlock`, and the
    distance h of maps and of their averages, see :func:`hierarchical_distance`. r_l is the RMS of the teacher's level. The
    blocks are trained with the student and no part of it.

    ReviewKD, "Distilling Knowledge via Knowledge Review", CVPR 2021, arXiv 2104.09044, by the authors' code for
    Detectron2. Published forms have r_l = 1 (``normalize=False``). Difference: a batch normalisation of a single
    value in the batch, as of one cell of one image, which PyTorch refuses, uses the running statistics.

    Batch statistics and means over entries are those of the process's images, as published.

    Reads: ``student.features``, ``teacher.features``, and ``teacher.images`` to measure r_l.

    Args:
        levels: level names of the student, or ``{student level: teacher level}``. None: all matching levels, also those
            of a top block of the same kind, as published. The finest one takes most of the time.
        width: channels of x. None: the teacher's.
        norm: "BN", as published, with statistics of the batch; or "GN", which does not depend on its size.
        normalize: whether the teacher's maps are divided by r_l. The student's end in a normalisation.
        weight: a number or a schedule. Published ones are 0.8 to 2.

    Raises:
        InputError: if ``norm`` or ``width`` is invalid.

    Example:
        >>> from d2kd.testing import batch, sum_distill_losses, distiller, forward_losses, tiny_retinanet
        >>> sum_distill_losses(forward_losses(distiller(ReviewKDLoss, tiny_retinanet), batch())).item() > 0
        True
    """

    def __init__(
        self,
        *,
        levels: LevelChoice = None,
        width: int | None = None,
        norm: str = "BN",
        normalize: bool = True,
        weight: Weight = 1.0,
    ):
        super().__init__(levels=levels, adapter=None, normalize=normalize, weight=weight)
        if norm not in NORMS:
            raise InputError("norm", norm, " or ".join(NORMS))
        if width is not None and width < 1:
            raise InputError("width", width, "a positive number of channels")
        self.width, self.norm, self.is_identity = width, norm, False

    def setup(self, student: nn.Module, teacher: nn.Module) -> None:
        super().setup(student, teacher)
        shapes = student.backbone.output_shape()
        width = self.width or max(self.channels.values())
        pairs = ", ".join(f"{level} to {match}" for level, match in self.levels.items())
        logger.info("ReviewKD compares %s, fused in %d channels", pairs, width)
        coarse_to_fine = sorted(self.levels, key=self.strides.get, reverse=True)
        self.blocks = nn.ModuleDict(
            {
                level: ReviewBlock(
                    shapes[level].channels,
                    width,
                    self.channels[level],
                    self.norm,
                    fuses=position > 0,
                )
                for position, level in enumerate(coarse_to_fine)
            }
        )

    def make_identity(self) -> None:
        """Compare the student's maps as they are, since a block with a normalisation cannot be the identity."""
        self.is_identity = True

    def forward(self, student, teacher) -> Tensor:
        pairs = self.map_pairs(student, teacher)
        reviewed = self.review({level: s for level, (s, _) in pairs.items()})
        return sum(
            hierarchical_distance(reviewed[level], self.in_units(t, level))
            for level, (_, t) in pairs.items()
        )

    def review(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return for each level of the student's maps the fused map ``(N, C, H, W)`` that is compared."""
        if self.is_identity:
            return {level: self.in_units(x, level) for level, x in features.items()}
        reviewed, carried = {}, None
        for level, block in self.blocks.items():
            carried, reviewed[level] = block(features[level], carried)
        return reviewed


class ReviewBlock(nn.Module):
    """Fuses a level of the student with what is carried from coarser levels, and brings it to the teacher's channels.

    Args:
        in_channels, width, out_channels: of the student's level, of what is carried, and of the teacher's level.
        norm: "BN" or "GN".
        fuses: whether there is a coarser level.
    """

    def __init__(self, in_channels: int, width: int, out_channels: int, norm: str, fuses: bool):
        super().__init__()
        make_norm = NORMS[norm]
        self.reduce = nn.Sequential(nn.Conv2d(in_channels, width, 1, bias=False), make_norm(width))
        self.attention = nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid()) if fuses else None
        self.expand = nn.Sequential(
            nn.Conv2d(width, out_channels, 3, padding=1, bias=False), make_norm(out_channels)
        )
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.kaiming_uniform_(conv.weight, a=1)

    def forward(self, features: Tensor, carried: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return what is carried to the next finer level, ``(N, width, H, W)``, and the map that is compared."""
        fused = self.reduce(features)
        if self.attention is not None:
            carried = F.interpolate(carried, fused.shape[-2:], mode="nearest")
            own, other = self.attention(torch.cat([fused, carried], dim=1)).split(1, dim=1)
            fused = fused * own + carried * other
        return fused, self.expand(fused)


class SafeBatchNorm2d(nn.BatchNorm2d):
    """A batch normalisation that uses the running statistics where each channel has a single value."""

    def forward(self, features: Tensor) -> Tensor:
        if features.numel() > features.shape[1]:
            return super().forward(features)
        return F.batch_norm(
            features, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


def _group_norm(channels: int) -> nn.GroupNorm:
    # At least two channels in a group, or one cell would be a single value.
    return nn.GroupNorm(math.gcd(32, channels, max(1, channels // 2)), channels)


NORMS = {"BN": SafeBatchNorm2d, "GN": _group_norm}


@in_float32
def hierarchical_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared error of two maps ``(N, C, H, W)`` and of their averages, a scalar.

    The averages are of 4x4, 2x2 and 1 parts of a map, those of fewer parts than its height alone. Their weights are 1/2,
    1/4 and so on, and the sum is divided by that of all weights.
    """
    distance, weight, total = F.mse_loss(student, teacher), 1.0, 1.0
    for size in POOLED_SIZES:
        if size < student.shape[2]:
            weight /= 2
            total += weight
            pooled = (F.adaptive_avg_pool2d(x, size) for x in (student, teacher))
            distance = distance + weight * F.mse_loss(*pooled)
    return distance / total
