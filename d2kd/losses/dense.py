"""The base class of losses between the predictions of two dense detectors with equal anchors.

Notation: N images, R anchors of all levels, K classes that both detectors have.
"""

from __future__ import annotations

import torch
from detectron2.structures import Boxes
from torch import Tensor, nn

from ..modeling.anchors import check_anchors
from ..structures.class_map import num_classes_of
from ..utils.errors import InputError
from .base import DistillLoss


class DenseLoss(DistillLoss):
    """Base class of losses between dense predictions, whose rows correspond because the anchors are equal.

    Raises:
        InputError: in ``setup``, if the detectors are not dense or their anchors differ, if they have no class in
            common, or if classes differ and their names were not given.
    """

    def setup(self, student: nn.Module, teacher: nn.Module) -> None:
        check_anchors(student, teacher, self.scale)
        counts = [num_classes_of(detector) for detector in (student, teacher)]
        if self.class_map is None and counts[0] != counts[1]:
            found = f"student {counts[0]}, teacher {counts[1]}"
            expected = (
                "the same classes, or the names of both: the teacher's and the Distiller's classes"
            )
            raise InputError("num_classes", found, expected)
        if self.class_map is not None and not self.class_map.pairs:
            raise InputError("classes", "none is the student's and the teacher's", "at least one")

    def shared_classes(self, x: Tensor, side: str) -> Tensor:
        """Return the entries of the shared classes, ``(…, K)``, in float32.

        Args:
            x: ``(…, classes of that side)``, one entry for each class.
            side: whose classes they are, "student_ids" or "teacher_ids".
        """
        x = x.float()
        if self.class_map is None or self.class_map.is_identity:
            return x
        index = torch.tensor(getattr(self.class_map, side))
        return x[..., index.to(x.device, non_blocking=True)]

    def logits(self, student, teacher) -> tuple[Tensor, Tensor]:
        """Return both sides' class logits of the shared classes, ``(N, R, K)`` each."""
        return (
            self.shared_classes(torch.cat(student.pred_logits, dim=1), "student_ids"),
            self.shared_classes(torch.cat(teacher.pred_logits, dim=1), "teacher_ids"),
        )

    def labels(self, student) -> Tensor:
        """Return the student's labels ``(N, R)`` in ``{-1, 0, …, K}``: K background, -1 an anchor that does not count.

        These are the ignored ones, and those of objects of a class that the teacher lacks.
        """
        labels = student.gt_labels
        return labels if self.class_map is None else self.class_map.map_labels(labels)

    def num_shared_classes(self, detector: nn.Module) -> int:
        """Return K, given one of the detectors."""
        return num_classes_of(detector) if self.class_map is None else len(self.class_map.pairs)


def decode_boxes(detector: nn.Module, deltas: Tensor, anchors: list[Boxes]) -> Tensor:
    """Return the boxes ``(N, R, 4)``, XYXY in pixels, of deltas ``(N, R, 4)`` in the detector's box coder."""
    # Box coders need float32.
    boxes = Boxes.cat(anchors).tensor.repeat(len(deltas), 1)
    decoded = detector.box2box_transform.apply_deltas(deltas.float().flatten(0, 1), boxes)
    return decoded.view_as(deltas)


def positives_per_image(positive: Tensor) -> Tensor:
    """Return the number of positives ``(N, R)``, at least one for each image, as GFL counts them: a scalar."""
    return positive.sum(dim=1).clamp(min=1).sum()
