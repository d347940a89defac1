"""Learning without Forgetting on a dense detector, as we port it: all old logits, wherever the images are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers.masks import valid_cells
from ..modeling.outputs import DenseOutputs
from .base import DistillLoss, Weight, check_anchors
from .erd import check_old_classes, old_classes


class LwFLoss(DistillLoss):
    """``mean over locations and old classes of (c^S - c^T)^2``, the plain form that a selection is compared with.

    Locations are those of the cells that the images cover, in part at least: padding does not count.

    In the manner of "Learning without Forgetting" (arXiv 1606.09282), which is about classification: old
    answers on new data are the target. *This port is ours*; how others ported it to detectors is not known. On
    raw logits, as :class:`~d2kd.losses.ERDLoss` compares them at selected locations; boxes are not compared.

    Reads: ``student.pred_logits``, ``teacher.pred_logits``, ``teacher.images``.

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
        valid = valid_rows(teacher)
        (count,) = self.normalizer(valid.sum() * difference.shape[-1])
        return (difference.square() * valid[..., None]).sum() / count


def valid_rows(outputs: DenseOutputs) -> Tensor:
    """Which rows of a dense detector's answers are of cells that the images cover: ``(N, R)`` bool, R of all levels."""
    images, maps = outputs.images, outputs.predictions[0]
    sizes = [one.shape[-2:] for one in maps]
    cells = valid_cells(images.image_sizes, images.tensor.shape[-2:], sizes, images.tensor.device)
    anchors = maps[0].shape[1] // outputs.detector.num_classes
    return torch.cat([x.flatten(1).repeat_interleave(anchors, dim=1) for x in cells], dim=1)
