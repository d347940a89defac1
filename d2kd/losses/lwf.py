"""Learning without Forgetting on a dense detector, as we port it: all old logits, everywhere."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import DistillLoss, Weight, check_anchors
from .erd import check_old_classes, old_classes


class LwFLoss(DistillLoss):
    """``mean over locations and old classes of (c^S - c^T)^2``, the plain form that a selection is compared with.

    In the manner of "Learning without Forgetting" (arXiv 1606.09282), which is about classification: old
    answers on new data are the target. *This port is ours*; how others ported it to detectors is not known. On
    raw logits, as :class:`~d2kd.losses.ERDLoss` compares them at selected locations; boxes are not compared.

    Reads: ``student.pred_logits``, ``teacher.pred_logits``.

    Args:
        weight: a number or a schedule.
        across_processes: see :class:`~d2kd.losses.DistillLoss`.

    Raises:
        InputError: on ``bind``, detectors without equal anchors, that have no class in common, or whose old classes
            are not the teacher's.
    """

    def __init__(self, *, weight: Weight = 1.0, across_processes: bool = True):
        super().__init__(weight=weight, across_processes=across_processes)

    def bind(self, student: nn.Module, teacher: nn.Module) -> None:
        check_anchors(student, teacher, self.scale)
        check_old_classes(self, student, teacher)

    def forward(self, student, teacher) -> Tensor:
        ours, theirs = (torch.cat(x.pred_logits, dim=1).float() for x in (student, teacher))
        difference = ours[..., old_classes(self, "of_student")]
        difference = difference - theirs[..., old_classes(self, "of_teacher")]
        (count,) = self.normalizer(difference.new_full((), difference.numel()))
        return difference.square().sum() / count
