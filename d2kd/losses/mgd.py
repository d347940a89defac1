"""MGD: a small network generates the teacher's feature maps from the student's, of which a part is masked."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers.adapter import LevelChoice
from ..utils.errors import InputError
from .base import SeededLoss, Weight
from .features import FeatureLoss
from .functional import in_float32

WEIGHTS = {"mean": (115.0, 11.0), "sum": (2e-5, 5e-7)}
"""Weights of one-stage and of two-stage students, by reduction."""

MASK_RATIOS = (0.65, 0.45)
"""Of one-stage and of two-stage students."""


class MGDLoss(FeatureLoss, SeededLoss):
    """Squared error of the teacher's feature maps as generated from masked maps of the student.

        loss = 1/D sum_l sum_nchw (G_l(M^l A_l(S^l) / r_l) - T^l / r_l)^2,   G(x) = conv3x3(ReLU(conv3x3(x)))

    M is 0 with probability ``mask_ratio``, else 1, drawn in each step for each image, level and cell, for all channels
    together. The error counts in all cells, masked or not. r_l is the RMS of the teacher's level. The generators G_l have
    the teacher's channels. They are trained with the student and are no part of it.

    MGD, "Masked Generative Distillation", ECCV 2022, arXiv 2205.01529, by the authors' code, which masks with probability
    ``mask_ratio`` where the paper prints the opposite inequality. Published forms have r_l = 1 (``normalize=False``) and
    ``reduction="sum"``: D is the number of images. Then the weight grows with the size of images. With "mean", D is the
    number of entries of all levels together. The weights are those of the published sum for an image of 800x1344 and 256
    channels: 22400 cells of P3-P7 times 256 times 2e-5 is 115, and 89250 cells of P2-P5 times 256 times 5e-7 is 11.

    D is that of all processes over their number. Masks are drawn from the loss's own generator, so the student's
    training draws the same numbers as without the loss.

    Reads: ``student.features``, ``teacher.features``, and ``teacher.images`` to measure r_l.

    Args:
        levels: level names of the student, or ``{student level: teacher level}``. None: all matching levels but those
            that are only pooled: P3-P7 of a RetinaNet, P2-P5 of a Faster R-CNN, as published.
        mask_ratio: probability that a cell is masked. None: 0.45 for two-stage students, 0.65 for others.
        reduction: "mean" or "sum", see above.
        adapter: kind of adapter, see :class:`d2kd.layers.adapter.FeatureAdapter`.
        normalize: whether both sides are divided by r_l.
        seed: see :class:`~d2kd.losses.SeededLoss`.
        weight: a number or a schedule. None: by ``reduction``, 11 or 5e-7 for two-stage students, 115 or 2e-5 for others.
        across_processes: see :class:`~d2kd.losses.DistillLoss`.

    Raises:
        InputError: if ``reduction`` or ``mask_ratio`` is invalid.

    Example:
        >>> from d2kd.testing import batch, sum_distill_losses, distiller, forward_losses, tiny_retinanet
        >>> sum_distill_losses(forward_losses(distiller(MGDLoss, tiny_retinanet), batch())).item() > 0
        True
    """

    def __init__(
        self,
        *,
        levels: LevelChoice = None,
        mask_ratio: float | None = None,
        reduction: str = "mean",
        adapter: str = "auto",
        normalize: bool = True,
        seed: int = 0,
        weight: Weight | None = None,
        across_processes: bool = True,
    ):
        super().__init__(
            levels=levels,
            adapter=adapter,
            normalize=normalize,
            seed=seed,
            weight=weight,
            across_processes=across_processes,
        )
        if reduction not in WEIGHTS:
            raise InputError("reduction", reduction, " or ".join(WEIGHTS))
        if mask_ratio is not None and not 0 <= mask_ratio <= 1:
            raise InputError("mask_ratio", mask_ratio, "a probability")
        self.mask_ratio, self.reduction = mask_ratio, reduction

    default_levels = FeatureLoss.convolved_levels

    def setup(self, student: nn.Module, teacher: nn.Module) -> None:
        super().setup(student, teacher)
        two_stage = hasattr(student, "roi_heads")
        if self.weight is None:
            self.weight = WEIGHTS[self.reduction][two_stage]
        if self.mask_ratio is None:
            self.mask_ratio = MASK_RATIOS[two_stage]
        self.generators = nn.ModuleDict(
            {level: _generator(channels) for level, channels in self.channels.items()}
        )

    def make_identity(self) -> None:
        """Mask nothing and take the student's maps for the generated ones, since a ReLU cannot be the identity."""
        self.mask_ratio = 0.0
        self.generators = nn.ModuleDict({level: nn.Identity() for level in self.levels})

    def forward(self, student, teacher) -> Tensor:
        pairs = self.map_pairs(student, teacher)
        generator = self.generator()
        errors = []
        for level, (s, t) in pairs.items():
            uniform = torch.rand(len(s), 1, *s.shape[-2:], generator=generator)
            keep = self.kept_cells(uniform).to(s.device, non_blocking=True)
            errors.append(self.error(level, self.in_units(s, level), self.in_units(t, level), keep))
        if self.reduction == "sum":
            return sum(errors) / self.num_images(s)
        entries = sum(t.numel() for _, t in pairs.values())
        (divisor,) = self.normalizer(torch.full((), float(entries), device=s.device))
        return sum(errors) / divisor

    def kept_cells(self, uniform: Tensor) -> Tensor:
        """Return which cells are not masked, 1 or 0, of numbers drawn from [0, 1)."""
        return (uniform <= 1 - self.mask_ratio).float()

    def error(self, level: str, student: Tensor, teacher: Tensor, keep: Tensor) -> Tensor:
        """Return the sum of squared errors of a level, a scalar.

        Args:
            level: name of the student's.
            student, teacher: adapted map and target, ``(N, C, H, W)``.
            keep: 0 in masked cells, else 1, ``(N, 1, H, W)``.
        """
        return squared_error(self.generators[level](student * keep.to(student.dtype)), teacher)


def _generator(channels: int) -> nn.Sequential:
    first, second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
    return nn.Sequential(first, nn.ReLU(inplace=True), second)


@in_float32
def squared_error(found: Tensor, target: Tensor) -> Tensor:
    """Return the sum of squared differences, in float32: of so many terms it overflows half precision."""
    return (found - target).square().sum()
