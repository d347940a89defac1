"""Task Adaptive Regularization for two-stage detectors: transfer where the teacher does better.

TAR, "Distilling Object Detectors with Task Adaptive Regularization", arXiv 2006.13108. Only its abstract
and secondary descriptions could be read, so this is *TAR as we implement it*: established are the shared
proposals, the three levels, the Gaussian mask, the regression gate and the decay; the formulas' constants,
the classification gate and the weights are ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    LinearParamScheduler,
)
from torch import Tensor, nn

from ..errors import InputError
from .base import DistillLoss, Weight, is_off, value_of
from .functional import in_float32, paired_iou, softmax_kl
from .imitation import ImitationLoss

CLS_GATES = ("better", "none")
REG_GATES = ("proposal", "student", "both", "none")


class TARLoss(DistillLoss):
    """Features, classification and box regression of shared regions, each where the teacher is right.

    For the R regions the student sampled, with labels y and the P of them that are foreground:

        feature         :class:`ImitationLoss` under Gaussian box masks
        classification  1/R sum_i a_i tau^2 KL(p_T,i || p_S,i),    a_i = [p_T,i(y_i) > p_S,i(y_i) + margin]
        regression      1/max(1, P) sum_i m_i sum_4 smooth_l1(t_S,i - t_T,i),
                        m_i = [IoU(box_T,i, gt_i) > IoU(region_i, gt_i)]

    Denominators are the counts of regions and not of open gates, so that a student that overtakes the
    teacher is released rather than pushed harder. Deltas are those of class y_i, in the student's coder.

    Reads: ``student.features``, ``gt_instances``, ``regions``; ``teacher.features``, ``regions``.

    Args:
        levels, adapter, mask: of the feature term, see :class:`ImitationLoss`.
        feature_weight, classification_weight, regression_weight: numbers or schedules; 0 removes a term
            and what it would ask of the teacher.
        cls_gate: "better" or "none".
        cls_margin: how much more probable the teacher must find the label.
        temperature: tau.
        background_weight: factor of background regions in the classification term.
        reg_gate: "proposal" (the teacher's box beats the region it started from), "student" (it beats the
            student's box), "both", or "none".
        smooth_l1_beta: where the regression turns from square to absolute, in normalised deltas.
        feature_ramp: fraction of the run in which the feature term grows linearly to its weight, for its
            adapters begin at random. 500 iterations of a 90k schedule.
        weight: the decay; linear to 0 over the run unless given.

    Raises:
        InputError: an unknown gate; on ``bind`` a detector without regions, or other classes.
    """

    def __init__(
        self,
        *,
        levels: Sequence[str] | None = None,
        mask: str = "gaussian",
        adapter: str = "auto",
        feature_weight: Weight = 0.01,
        classification_weight: Weight = 1.0,
        regression_weight: Weight = 1.0,
        cls_gate: str = "better",
        cls_margin: float = 0.0,
        temperature: float = 1.0,
        background_weight: float = 1.0,
        reg_gate: str = "proposal",
        smooth_l1_beta: float = 1.0,
        feature_ramp: float = 500 / 90000,
        weight: Weight | None = None,
    ):
        super().__init__(weight=LinearParamScheduler(1.0, 0.0) if weight is None else weight)
        for culprit, gate, gates in (
            ("cls_gate", cls_gate, CLS_GATES),
            ("reg_gate", reg_gate, REG_GATES),
        ):
            if gate not in gates:
                raise InputError(culprit, gate, " or ".join(gates))
        # The feature term is plain imitation under another mask; its weight is applied here, beside the others'.
        self.feature = (
            None
            if is_off(feature_weight)
            else ImitationLoss(levels=levels, mask=mask, adapter=adapter, weight=feature_weight)
        )
        self.classification_weight = classification_weight
        self.regression_weight = regression_weight
        self.cls_gate, self.cls_margin = cls_gate, cls_margin
        self.temperature, self.background_weight = temperature, background_weight
        self.reg_gate, self.smooth_l1_beta = reg_gate, smooth_l1_beta
        self.ramp = _ramp(feature_ramp)

    @property
    def reads_regions(self) -> bool:
        return not (is_off(self.classification_weight) and is_off(self.regression_weight))

    def bind(self, student: nn.Module, teacher: nn.Module) -> None:
        if self.feature is not None:
            self.feature.bind(student, teacher)
        if not self.reads_regions:
            return
        for side, detector in (("student", student), ("teacher", teacher)):
            if not hasattr(detector, "roi_heads"):
                raise InputError(
                    "regions",
                    f"the {side} is a {type(detector).__name__}, which has none",
                    "a two-stage detector, or classification_weight=0 and regression_weight=0",
                )
        ours, theirs = student.roi_heads.num_classes, teacher.roi_heads.num_classes
        if ours != theirs:
            raise InputError(
                "num_classes", f"student {ours}, teacher {theirs}", "the same classes for both"
            )

    def forward(self, student, teacher) -> dict[str, Tensor]:
        terms = {}
        if self.feature is not None:
            weight = value_of(self.feature.weight, self.progress)
            weight *= value_of(self.ramp, self.progress)
            if weight:
                terms["feature"] = weight * self.feature(student, teacher)
        for name, weight, term in (
            ("classification", self.classification_weight, self.classification),
            ("regression", self.regression_weight, self.regression),
        ):
            if weight := value_of(weight, self.progress):
                # The first stage; later ones of a cascade judge other boxes.
                terms[name] = weight * term(student.regions[0], teacher.regions[0])
        return terms

    def classification(self, student, teacher) -> Tensor:
        """The classification term of two ``Regions`` with equal boxes, unweighted."""
        return classification_term(
            student.pred_class_logits,
            teacher.pred_class_logits,
            student.gt_classes,
            gate=self.cls_gate,
            margin=self.cls_margin,
            temperature=self.temperature,
            background_weight=self.background_weight,
        )

    def regression(self, student, teacher) -> Tensor:
        """The regression term of two ``Regions`` with equal boxes, unweighted."""
        num_classes = student.pred_class_logits.shape[1] - 1
        rows = torch.nonzero((student.gt_classes >= 0) & (student.gt_classes < num_classes))[:, 0]
        classes = student.gt_classes[rows]
        boxes, gt = student.box_tensor[rows], student.gt_boxes[rows]
        ours = of_class(student.pred_proposal_deltas[rows], classes)
        theirs = of_class(teacher.pred_proposal_deltas[rows], classes).to(ours.dtype)
        coder = student.box2box_transform
        with torch.no_grad():
            # Detectron2's coders want float32, which half-precision deltas are not.
            teacher_boxes = teacher.box2box_transform.apply_deltas(theirs.float(), boxes)
            if tuple(teacher.box2box_transform.weights) != tuple(coder.weights):
                # Another coder: said again in the student's own units.
                theirs = coder.get_deltas(boxes, teacher_boxes)
            iou = paired_iou(teacher_boxes, gt)
            gate = torch.ones_like(iou, dtype=torch.bool)
            if self.reg_gate in ("proposal", "both"):
                gate &= iou > paired_iou(boxes, gt)
            if self.reg_gate in ("student", "both"):
                gate &= iou > paired_iou(coder.apply_deltas(ours.float(), boxes), gt)
        return regression_term(ours, theirs, gate, beta=self.smooth_l1_beta)


@in_float32
def classification_term(
    student_logits: Tensor,
    teacher_logits: Tensor,
    gt_classes: Tensor,
    *,
    gate: str = "better",
    margin: float = 0.0,
    temperature: float = 1.0,
    background_weight: float = 1.0,
) -> Tensor:
    """``1/R sum_i w_i a_i tau^2 KL(p_T,i || p_S,i)``.

    Args:
        student_logits, teacher_logits: ``(R, K + 1)``, background last.
        gt_classes: ``(R,)`` in ``[0, K]``; a negative label is ignored, in the denominator too.
    """
    known = gt_classes >= 0
    divergence = softmax_kl(student_logits, teacher_logits, temperature)
    with torch.no_grad():
        weight = known.to(divergence.dtype)
        weight = torch.where(
            gt_classes == student_logits.shape[1] - 1, weight * background_weight, weight
        )
        if gate == "better":
            label = gt_classes.clamp(min=0)[:, None]
            ours = F.softmax(student_logits / temperature, dim=1).gather(1, label)[:, 0]
            theirs = F.softmax(teacher_logits / temperature, dim=1).gather(1, label)[:, 0]
            weight = weight * (theirs > ours + margin)
    return (divergence * weight).sum() / known.sum().clamp(min=1)


@in_float32
def regression_term(student: Tensor, teacher: Tensor, gate: Tensor, *, beta: float = 1.0) -> Tensor:
    """``1/max(1, P) sum_i m_i sum_4 smooth_l1``; ``(P, 4)`` deltas of foreground rows, ``(P,)`` gate."""
    errors = F.smooth_l1_loss(student, teacher.detach(), reduction="none", beta=beta).sum(dim=1)
    return (errors * gate).sum() / max(len(errors), 1)


def of_class(deltas: Tensor, classes: Tensor) -> Tensor:
    """Each row's deltas for its class, ``(P, 4)`` of ``(P, 4K)``; class-agnostic ones as they are."""
    if deltas.shape[1] == 4:
        return deltas
    rows = torch.arange(len(deltas), device=deltas.device)
    return deltas.view(len(deltas), deltas.shape[1] // 4, 4)[rows, classes]


def _ramp(length: float):
    """0 to 1 over the first ``length`` of the run, then 1."""
    if not 0 <= length < 1:
        raise InputError("feature_ramp", length, "a fraction of the run, from 0 to less than 1")
    if length == 0:
        return ConstantParamScheduler(1.0)
    return CompositeParamScheduler(
        [LinearParamScheduler(0.0, 1.0), ConstantParamScheduler(1.0)],
        lengths=[length, 1 - length],
        interval_scaling=["rescaled", "fixed"],
    )
