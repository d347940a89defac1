"""Plain feature imitation: the student's maps regress the teacher's, everywhere or near objects."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..layers.adapter import FeatureAdapter, match_levels
from ..layers.masks import KINDS, pad_boxes, paint, valid_cells
from ..utils.errors import InputError
from .base import DistillLoss, Weight
from .functional import masked_squared_error


class ImitationLoss(DistillLoss):
    """Masked squared distance between feature maps (FitNets, arXiv 1412.6550, on a pyramid).

        loss = 1/L sum_l 1/(2 N_l) sum_bij M^l_bij sum_c (A_l(S^l) - T^l)^2,   N_l = max(1, sum M^l)

    The normalisation by the mask's sum and its factor 2 are those of FGFI's public code (arXiv 1906.03609),
    whose mask comes from anchors instead; boxes are painted on every level. Padding never counts.

    Reads: ``student.features``, ``student.gt_instances`` (unless ``mask="none"``), ``teacher.features`` and, with
    ``mask="none"``, ``teacher.images``.

    Args:
        levels: level names of the student; None: all that match, see :func:`d2kd.layers.adapter.match_levels`.
        mask: "gaussian" or "box", see :func:`d2kd.layers.masks.paint`, or "none": all cells that the images cover.
        adapter: see :class:`d2kd.layers.adapter.FeatureAdapter`.
        weight: a number or a schedule; FGFI's 0.01.
        across_processes: see :class:`~d2kd.losses.DistillLoss`.
    """

    def __init__(
        self,
        *,
        levels: Sequence[str] | None = None,
        mask: str = "box",
        adapter: str = "auto",
        weight: Weight = 0.01,
        across_processes: bool = True,
    ):
        super().__init__(weight=weight, across_processes=across_processes)
        self.wanted = None if levels is None else list(levels)
        if mask not in (*KINDS, "none"):
            raise InputError("mask", mask, " or ".join((*KINDS, "none")))
        self.mask = mask
        self.adapter = adapter

    def bind(self, student: nn.Module, teacher: nn.Module) -> None:
        self.levels = match_levels(student.backbone, teacher.backbone, self.wanted, self.scale)
        ours, theirs = student.backbone.output_shape(), teacher.backbone.output_shape()
        self.strides = {level: ours[level].stride for level in self.levels}
        self.adapters = FeatureAdapter(ours, theirs, self.levels, self.adapter)

    def forward(self, student, teacher) -> Tensor:
        pairs = [
            self.adapters(student.features[level], teacher.features[match], level)
            for level, match in self.levels.items()
        ]
        if self.mask == "none":
            images = teacher.images
            masks = valid_cells(
                images.image_sizes,
                images.tensor.shape[-2:],
                [teacher.features[match].shape[-2:] for match in self.levels.values()],
                images.tensor.device,
            )
            masks = [
                mask[:, : theirs.shape[-2], : theirs.shape[-1]].float()
                for mask, (_, theirs) in zip(masks, pairs)
            ]
        else:
            boxes = pad_boxes([x.gt_boxes.tensor for x in student.gt_instances])
            masks = [
                paint(boxes, tuple(ours.shape[-2:]), self.strides[level], self.mask)
                for level, (ours, _) in zip(self.levels, pairs)
            ]
        normalizers = self.normalizer(*(mask.sum() for mask in masks))
        terms = [
            masked_squared_error(ours, theirs, mask, normalizer)
            for (ours, theirs), mask, normalizer in zip(pairs, masks, normalizers)
        ]
        return sum(terms) / len(terms)
