"""Learning without Forgetting for dense detectors: all logits of the old classes, at all locations in the images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers.masks import cells_in_images
from ..modeling.anchors import check_anchors
from ..modeling.outputs import DenseOutputs
from .base import DistillLoss, Weight
from .erd import select_old_classes, set_old_classes


class LwFLoss(DistillLoss):
    """``mean over locations and old classes of (c^S - c^T)^2``, a baseline for methods that select locations.

    Locations are those of all cells that the images cover at least partly, so padding is excluded.

    "Learning without Forgetting" (arXiv 1606.09282) is about classification: predictions of the old model on new data
    are the targets. *The form for detectors is this project's* and may differ from other adaptations. It compares
    raw logits, as :class:`~d2kd.losses.ERDLoss` does at selected locations, and no boxes.

    Reads: ``student.pred_logits``, ``teacher.pred_logits``, ``teacher.images``.

    Args:
        weight: a number or a schedule.
        across_processes: see :class:`~d2kd.losses.DistillLoss`.

    Raises:
        InputError: in ``setup``, if the detectors have different anchors, no class in common, or the student has fewer
            classes than the teacher.

    Example:
        >>> from d2kd.testing import batch, sum_distill_losses, distiller, forward_losses, tiny_fcos
        >>> sum_distill_losses(forward_losses(distiller(LwFLoss, tiny_fcos), batch())).item() > 0
        True
        >>> sum_distill_losses(forward_losses(distiller(LwFLoss, tiny_fcos, same=True), batch())).item()  # the teacher is a copy
        0.0
    """

    needs_ground_truth = False

    def __init__(self, *, weight: Weight = 1.0, across_processes: bool = True):
        super().__init__(weight=weight, across_processes=across_processes)

    def setup(self, student: nn.Module, teacher: nn.Module) -> None:
        check_anchors(student, teacher, self.scale)
        set_old_classes(self, student, teacher)

    def forward(self, student, teacher) -> Tensor:
        s, t = (torch.cat(x.pred_logits, dim=1).float() for x in (student, teacher))
        difference = select_old_classes(self, s, "student") - select_old_classes(self, t, "teacher")
        valid = valid_locations(teacher)
        (count,) = self.normalizer(valid.sum() * difference.shape[-1])
        return (difference.square() * valid[..., None]).sum() / count


def valid_locations(outputs: DenseOutputs) -> Tensor:
    """Return which of the R predictions of all levels are in cells that the images cover: ``(N, R)`` bool."""
    maps = outputs.predictions[0]
    sizes = [x.shape[-2:] for x in maps]
    cells = cells_in_images(outputs.images, sizes)
    anchors = maps[0].shape[1] // outputs.detector.num_classes
    return torch.cat([x.flatten(1).repeat_interleave(anchors, dim=1) for x in cells], dim=1)
