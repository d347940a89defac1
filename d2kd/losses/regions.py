"""What losses between the classes of regions have in common."""

from __future__ import annotations

from torch import Tensor, nn

from ..modeling.outputs import Regions, uses_sigmoid_scores
from ..structures.class_map import ClassMap, check_shared_classes
from ..utils.errors import InputError


def check_softmax_regions(
    student: nn.Module, teacher: nn.Module, class_map: ClassMap | None
) -> None:
    """Raise InputError unless both detectors have regions whose classes are a softmax, and classes in common."""
    for side, detector in (("student", student), ("teacher", teacher)):
        if not hasattr(detector, "roi_heads"):
            found = f"the {side}, a {type(detector).__name__}, has none"
            raise InputError("regions", found, "two-stage detectors")
        if uses_sigmoid_scores(detector):
            found = (
                f"a {type(detector).__name__} with use_sigmoid_ce, whose classes have no softmax"
            )
            raise InputError("regions", found, "box heads with softmax")
    check_shared_classes(student, teacher, class_map)


def shared_region_logits(
    student: Regions, teacher: Regions, class_map: ClassMap | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return both sides' logits of the shared classes and the background, ``(R, K + 1)``, and the labels ``(R,)``.

    Labels are indices of these logits; -1 where the teacher does not have the class. Of unlabelled images they are the
    teacher's most probable classes.
    """
    s, t, labels = student.pred_class_logits, teacher.pred_class_logits, student.gt_classes
    if class_map is not None:
        s, t = class_map.shared_logits(s, t, background=True)
        labels = None if labels is None else class_map.map_labels(labels)
    return s, t, t.argmax(dim=1) if labels is None else labels
