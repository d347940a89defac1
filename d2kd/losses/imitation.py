"""Feature imitation: the student's feature maps regress the teacher's, everywhere or inside objects."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..layers.adapter import FeatureAdapter, covered_cells, match_levels, teacher_maps
from ..layers.feature_rms import FeatureRMS
from ..layers.masks import MASK_KINDS, boxes_to_mask, pad_boxes
from ..utils.errors import InputError
from .base import DistillLoss, Weight
from .functional import masked_squared_error


class ImitationLoss(DistillLoss):
    """Masked squared distance between feature maps (FitNets, arXiv 1412.6550, on a pyramid).

        loss = 1/L sum_l 1/(2 N_l) sum_bij M^l_bij sum_c ((A_l(S^l) - T^l) / r_l)^2,   N_l = max(1, sum M^l)

    The normalisation by twice the mask's sum is that of FGFI's public code (arXiv 1906.03609). FGFI makes its mask from
    anchors. Here every box is drawn on every level. Padding never contributes. r_l is the RMS of the teacher's level,
    see :class:`~d2kd.layers.feature_rms.FeatureRMS`, which is not in these papers: they have r_l = 1.

    Reads: ``student.features``, ``student.gt_instances`` (unless ``mask="none"``), ``teacher.features``, and
    ``teacher.images`` with ``mask="none"`` or to measure r_l.

    Args:
        levels: level names of the student. None: all matching levels, see :func:`d2kd.layers.adapter.match_levels`.
        mask: "gaussian" or "box", see :func:`d2kd.layers.masks.boxes_to_mask`; or "none", all cells covered by the images.
        adapter: kind of adapter, see :class:`d2kd.layers.adapter.FeatureAdapter`.
        normalize: whether differences are divided by r_l. False: r_l = 1, as published.
        weight: a number or a schedule. FGFI's is 0.01, without r_l.
        across_processes: see :class:`~d2kd.losses.DistillLoss`.

    Example:
        >>> from d2kd.testing import batch, sum_distill_losses, distiller, forward_losses, tiny_retinanet
        >>> model = distiller(lambda: ImitationLoss(levels=["p3"], mask="none"), tiny_retinanet, same=True)
        >>> sum_distill_losses(forward_losses(model, batch())).item()  # the teacher is a copy
        0.0
    """

    def __init__(
        self,
        *,
        levels: Sequence[str] | None = None,
        mask: str = "box",
        adapter: str = "auto",
        normalize: bool = True,
        weight: Weight = 0.3,
        across_processes: bool = True,
    ):
        super().__init__(weight=weight, across_processes=across_processes)
        self.level_names = None if levels is None else list(levels)
        if mask not in (*MASK_KINDS, "none"):
            raise InputError("mask", mask, " or ".join((*MASK_KINDS, "none")))
        self.mask = mask
        self.adapter = adapter
        self.normalize = normalize

    def setup(self, student: nn.Module, teacher: nn.Module) -> None:
        self.levels = match_levels(student.backbone, teacher.backbone, self.level_names, self.scale)
        shapes = student.backbone.output_shape()
        self.strides = {level: shapes[level].stride for level in self.levels}
        self.adapters = FeatureAdapter(
            shapes, teacher.backbone.output_shape(), self.levels, self.adapter
        )
        if self.normalize:
            self.rms = FeatureRMS(self.levels.values())

    def forward(self, student, teacher) -> Tensor:
        if self.normalize:
            self.rms.measure_once(teacher)
        both = student, teacher, self.levels, self.strides, self.scale
        pairs = [
            self.adapters(student.features[level], target, level)
            for level, target in zip(self.levels, teacher_maps(*both), strict=True)
        ]
        if self.mask == "none":
            masks = [
                mask[:, : target.shape[-2], : target.shape[-1]].float()
                for mask, (_, target) in zip(covered_cells(*both), pairs)
            ]
        else:
            boxes = pad_boxes([x.gt_boxes.tensor for x in student.gt_instances])
            masks = [
                boxes_to_mask(boxes, tuple(adapted.shape[-2:]), self.strides[level], self.mask)
                for level, (adapted, _) in zip(self.levels, pairs)
            ]
        normalizers = self.normalizer(*(mask.sum() for mask in masks))
        terms = [
            masked_squared_error(adapted, target, mask, normalizer)
            for (adapted, target), mask, normalizer in zip(pairs, masks, normalizers)
        ]
        if self.normalize:
            terms = [
                term / self.rms(match).square()
                for term, match in zip(terms, self.levels.values(), strict=True)
            ]
        return sum(terms) / len(terms)
