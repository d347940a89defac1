"""BCKD: dense detectors as many binary classifiers, and boxes where their scores differ."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers.focal_losses import quality_focal_loss
from ..modeling.atss import is_foreground
from ..modeling.box_regression import generalized_iou_loss
from ..utils.errors import InputError
from .base import Weight
from .dense import DenseLoss, decode_boxes, positives_per_image
from .functional import sigmoid_divergence

LEVELS = ("all", "with_objects")


class BCKDLoss(DenseLoss):
    """Distill each class as a binary task, and boxes where the class scores differ.

    BCKD, "Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object Detection", ICCV 2023
    (arXiv 2308.14286). Over all anchors a that are not ignored, with p = sigmoid(class logits) of student S and teacher T:

        class  w_c / Z sum_a sum_k |p_T,ak - p_S,ak| BCE(p_S,ak, p_T,ak)
        box    w_b / Z sum_a max_k |p_T,ak - p_S,ak| (1 - GIoU(box_S,a, box_T,a)),   the factor carries no gradient
        Z      sum over images of max(1, foreground anchors)

    Here every level counts. The authors' code skips levels without a foreground anchor, a side effect of its control
    flow: ``levels="with_objects"``. It has GFL alone. RetinaNet and FCOS have the same terms; for FCOS, scores are those
    of the classes, without centerness.

    Value and gradient are 0 where both scores are equal, but the gradient of the class term jumps there, as that of an
    absolute value: it does not fade as the student comes near. ``factor_gradient=False``, not in the paper, is smooth.

    If the class lists differ (``class_map``), the shared classes are compared, and anchors of objects of other classes
    do not count.

    In unlabelled images, Z and ``levels`` count the anchors at which the teacher's highest score is above 1/2, and every anchor
    counts. This is this project's choice.

    Reads: ``student.pred_logits``, ``pred_anchor_deltas``, ``anchors``, ``gt_labels``; ``teacher.pred_logits``,
    ``pred_anchor_deltas``.

    Args:
        class_weight: w_c.
        box_weight: w_b. None: 4, as published, for GFL, whose other box losses have a weight of 2; 1 for others.
        levels: "all", or "with_objects": only levels with a foreground anchor in this process.
        factor_gradient: whether the factor of the class term carries gradient, as published.
        weight: a number or a schedule.
        across_processes: see :class:`~d2kd.losses.DistillLoss`.

    Raises:
        InputError: if ``levels`` is unknown. In ``setup``: see :class:`~d2kd.losses.dense.DenseLoss`.

    Example:
        >>> from d2kd.testing import batch, distiller, forward_losses, tiny_gfl
        >>> model = distiller(BCKDLoss, tiny_gfl, same=True)  # the teacher is a copy
        >>> {key: value.item() for key, value in forward_losses(model, batch()).items() if key.startswith("distill/")}
        {'distill/loss_loss_class': 0.0, 'distill/loss_loss_box': 0.0}
    """

    needs_ground_truth = False

    def __init__(
        self,
        *,
        class_weight: float = 1.0,
        box_weight: float | None = None,
        levels: str = "all",
        factor_gradient: bool = True,
        weight: Weight = 1.0,
        across_processes: bool = True,
    ):
        super().__init__(weight=weight, across_processes=across_processes)
        if levels not in LEVELS:
            raise InputError("levels", levels, " or ".join(LEVELS))
        self.class_weight, self.box_weight = class_weight, box_weight
        self.levels, self.factor_gradient = levels, factor_gradient

    def setup(self, student: nn.Module, teacher: nn.Module) -> None:
        super().setup(student, teacher)
        if self.box_weight is None:
            self.box_weight = 4.0 if hasattr(student.head, "reg_max") else 1.0

    def forward(self, student, teacher) -> dict[str, Tensor]:
        return {name: term.sum() for name, term in self.anchor_terms(student, teacher).items()}

    def anchor_terms(self, student, teacher) -> dict[str, Tensor]:
        """Return the share of each anchor in the terms "class" and "box": ``(N, R)`` each."""
        s, t = self.logits(student, teacher)
        labels = self.known_labels(student, teacher)
        positive = is_foreground(labels, s.shape[-1])
        used = labels >= 0
        if self.levels == "with_objects":
            by_level = positive.split([len(level) for level in student.anchors], dim=1)
            used = used & torch.cat([x.any().expand_as(x) for x in by_level], dim=1)
        (normalizer,) = self.normalizer(positives_per_image(positive))

        p_t = t.sigmoid()
        if self.factor_gradient:
            entropy = quality_focal_loss(s, p_t, beta=1.0)
        else:
            entropy, _, _ = sigmoid_divergence(s, t)
        difference = (p_t - s.detach().sigmoid()).abs().amax(dim=-1)
        s_boxes, t_boxes = (
            decode_boxes(
                x.detector, torch.cat(x.pred_anchor_deltas, dim=1), student.anchors, at_origin=True
            )
            for x in (student, teacher)
        )
        distance = generalized_iou_loss(s_boxes.flatten(0, 1), t_boxes.flatten(0, 1))
        terms = {
            "class": self.class_weight * entropy.sum(dim=-1),
            "box": self.box_weight * difference * distance.view_as(difference),
        }
        return {name: term.where(used, 0) / normalizer for name, term in terms.items()}
