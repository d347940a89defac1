"""Feature imitation: the student's feature maps regress the teacher's, everywhere or inside objects."""

from __future__ import annotations

from torch import Tensor

from ..layers.adapter import LevelChoice
from ..layers.masks import MASK_KINDS, boxes_to_mask, pad_boxes
from ..utils.errors import InputError
from .base import Weight
from .features import FeatureLoss
from .functional import masked_squared_error


class ImitationLoss(FeatureLoss):
    """Masked squared distance between feature maps (FitNets, arXiv 1412.6550, on a pyramid).

        loss = 1/L sum_l 1/(2 N_l) sum_bij M^l_bij sum_c ((A_l(S^l) - T^l) / r_l)^2,   N_l = max(1, sum M^l)

    The normalisation by twice the mask's sum is that of FGFI's public code (arXiv 1906.03609). FGFI makes its mask from
    anchors. Here every box is drawn on every level. Padding never contributes. r_l is the RMS of the teacher's level,
    see :class:`~d2kd.layers.feature_rms.FeatureRMS`, which is not in these papers: they have r_l = 1.

    Reads: ``student.features``, ``student.gt_instances`` (unless ``mask="none"``), ``teacher.features``, and
    ``teacher.images`` with ``mask="none"`` or to measure r_l.

    Args:
        levels: level names of the student, or ``{student level: teacher level}``. None: all matching levels, see
            :func:`d2kd.layers.adapter.match_levels`.
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
        levels: LevelChoice = None,
        mask: str = "box",
        adapter: str = "auto",
        normalize: bool = True,
        weight: Weight = 0.3,
        across_processes: bool = True,
    ):
        super().__init__(
            levels=levels,
            adapter=adapter,
            normalize=normalize,
            weight=weight,
            across_processes=across_processes,
        )
        if mask not in (*MASK_KINDS, "none"):
            raise InputError("mask", mask, " or ".join((*MASK_KINDS, "none")))
        self.mask = mask

    @property
    def needs_ground_truth(self) -> bool:
        return self.mask != "none"

    def forward(self, student, teacher) -> Tensor:
        pairs = self.map_pairs(student, teacher)
        if self.mask == "none":
            masks = [valid.float() for valid in self.valid_cells(student, teacher).values()]
        else:
            boxes = pad_boxes([x.gt_boxes.tensor for x in student.gt_instances])
            masks = [
                boxes_to_mask(boxes, tuple(adapted.shape[-2:]), self.strides[level], self.mask)
                for level, (adapted, _) in pairs.items()
            ]
        normalizers = self.normalizer(*(mask.sum() for mask in masks))
        terms = [
            masked_squared_error(*pair, mask, normalizer)
            for pair, mask, normalizer in zip(pairs.values(), masks, normalizers)
        ]
        if self.normalize:
            terms = [term / self.unit(level).square() for level, term in zip(pairs, terms)]
        return sum(terms) / len(terms)
