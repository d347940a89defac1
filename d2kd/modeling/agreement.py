"""Top-1 agreement of student and teacher, a training metric computed from outputs that exist already."""

from __future__ import annotations

import torch
from torch import Tensor

from ..structures.class_map import ClassMap
from .outputs import DetectorOutputs, uses_sigmoid_scores

TOPK_ANCHORS = 100


@torch.no_grad()
def top1_agreement(
    student: DetectorOutputs, teacher: DetectorOutputs, class_map: ClassMap | None = None
) -> Tensor | None:
    """Return the fraction of a batch's regions, or anchors, for which both detectors have the same top class.

    Regions of all stages count, and background is a class like any other. Of the anchors, the 100 of each image
    with the teacher's highest scores count. Nothing is computed by the teacher for this metric.

    Args:
        student: the captured outputs.
        teacher: its outputs; only those that a loss has read already are used.
        class_map: given if the classes differ; the shared classes are compared.

    Returns:
        a tensor of one number in [0, 1]; None if no loss has read the teacher's predictions, or if the two detectors are of
        different families, have no class in common or have different anchors.
    """
    if class_map is not None and not class_map.pairs:
        return None
    for name, same in (("regions", _same_in_regions), ("predictions", _same_in_anchors)):
        if name in vars(teacher) and hasattr(type(student), name):
            if name == "regions" and any(
                uses_sigmoid_scores(x.detector) for x in (student, teacher)
            ):
                return None  # no top class among the classes and the background
            agreed = same(student, teacher, class_map)
            return agreed.float().mean() if len(agreed) else None
    return None


def _same_in_regions(student, teacher, class_map: ClassMap | None) -> Tensor:
    agreed = []
    for pair in zip(student.regions, teacher.regions):
        x, y = (regions.pred_class_logits for regions in pair)
        if class_map is not None:
            x, y = class_map.shared_logits(x, y, background=True)
        agreed.append(x.argmax(dim=1) == y.argmax(dim=1))
    return torch.cat(agreed)


def _same_in_anchors(student, teacher, class_map: ClassMap | None) -> Tensor:
    pair = student.pred_logits, teacher.pred_logits
    if class_map is not None:
        index = torch.tensor([class_map.student_ids, class_map.teacher_ids])
        index = index.to(pair[0][0].device, non_blocking=True)
        pair = [[x.index_select(2, k) for x in logits] for logits, k in zip(pair, index)]
    logits, teacher_logits = pair
    if [x.shape for x in logits] != [x.shape for x in teacher_logits]:
        return logits[0].new_zeros(0)  # the anchors differ: no row is the same for both
    # Level by level, because logits are large: only two numbers for each anchor are concatenated.
    scores = torch.cat([x.amax(dim=2) for x in teacher_logits], dim=1)
    same = [x.argmax(dim=2) == y.argmax(dim=2) for x, y in zip(logits, teacher_logits)]
    best = scores.topk(min(TOPK_ANCHORS, scores.shape[1]), dim=1).indices
    return torch.cat(same, dim=1).take_along_dim(best, dim=1).flatten()
