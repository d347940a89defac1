"""Do teacher and student say the same class? Told while the student trains, of what both have computed anyway."""

from __future__ import annotations

import torch
from torch import Tensor

from ..structures.class_map import ClassMap
from .outputs import DetectorOutputs, scores_by_sigmoid

BEST = 100


@torch.no_grad()
def agreement(
    student: DetectorOutputs, teacher: DetectorOutputs, class_map: ClassMap | None = None
) -> float | None:
    """The share of a batch's regions, or anchors, whose top class is the same for both.

    Of regions the background is a class like any other, and all stages count; of anchors those count that the teacher
    is surest of, 100 of each image. The teacher is asked nothing: where no loss has read its predictions, or the two
    are of different families, there is no answer.

    Args:
        student: what was captured.
        teacher: what was asked so far.
        class_map: where the classes differ; the shared ones are compared.

    Returns:
        in [0, 1]; None where nothing can be compared.
    """
    if class_map is not None and not class_map.pairs:
        return None
    for name, same in (("regions", _of_regions), ("predictions", _of_anchors)):
        if name in vars(teacher) and hasattr(type(student), name):
            if name == "regions" and any(scores_by_sigmoid(x.detector) for x in (student, teacher)):
                return None  # no top class among the classes and the background
            agreed = same(student, teacher, class_map)
            return agreed.float().mean().item() if len(agreed) else None
    return None


def _of_regions(student, teacher, class_map: ClassMap | None) -> Tensor:
    agreed = []
    for ours, theirs in zip(student.regions, teacher.regions):
        ours, theirs = ours.pred_class_logits, theirs.pred_class_logits
        if class_map is not None:
            ours, theirs = class_map.shared_logits(ours, theirs, background=True)
        agreed.append(ours.argmax(dim=1) == theirs.argmax(dim=1))
    return torch.cat(agreed)


def _of_anchors(student, teacher, class_map: ClassMap | None) -> Tensor:
    ours, theirs = student.pred_logits, teacher.pred_logits
    if class_map is not None:
        index = torch.tensor([class_map.of_student, class_map.of_teacher], device=ours[0].device)
        ours, theirs = ([x.index_select(2, k) for x in of] for of, k in zip((ours, theirs), index))
    if [x.shape for x in ours] != [x.shape for x in theirs]:
        return ours[0].new_zeros(0)  # other anchors: no row is the same for both
    # Each level by itself, for logits are large: together are only two numbers of each anchor.
    sureness = torch.cat([x.amax(dim=2) for x in theirs], dim=1)
    same = [x.argmax(dim=2) == y.argmax(dim=2) for x, y in zip(ours, theirs)]
    best = sureness.topk(min(BEST, sureness.shape[1]), dim=1).indices
    return torch.cat(same, dim=1).take_along_dim(best, dim=1).flatten()
