"""Task Adaptive Regularization: transfer where the teacher does better.

TAR, "Distilling Object Detectors with Task Adaptive Regularization", arXiv 2006.13108. Only its abstract
and secondary descriptions could be read, so this is *TAR as we implement it*: established are the shared
proposals, the three levels, the Gaussian mask, the regression gate and the decay; the formulas' constants,
the classification gate, the weights and all of the one-stage form are ours.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.modeling.box_regression import Box2BoxTransformLinear
from detectron2.structures import Boxes
from detectron2.structures.boxes import matched_pairwise_iou
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    LinearParamScheduler,
)
from torch import Tensor, nn

from ..modeling.matcher import is_foreground
from ..modeling.outputs import scores_by_sigmoid
from ..structures.class_map import num_classes_of
from ..utils.errors import InputError
from .base import DistillLoss, Weight, check_anchors, is_off, value_of
from .functional import (
    at_least_one,
    in_float32,
    sigmoid_divergence,
    softmax_kl,
)
from .imitation import ImitationLoss

logger = logging.getLogger(__name__)

CLS_GATES = ("better", "none")
REG_GATES = ("proposal", "student", "both", "none")


class TARLoss(DistillLoss):
    """Features, classification and box regression, each where the teacher is right.

    Two-stage: for the R regions the student sampled, with labels y and the P of them that are foreground,

        feature         :class:`ImitationLoss` under Gaussian box masks
        classification  1/R sum_i a_i tau^2 KL(p_T,i || p_S,i),    a_i = [p_T,i(y_i) > p_S,i(y_i) + margin]
        regression      1/max(1, P) sum_i m_i sum_4 smooth_l1(t_S,i - t_T,i),
                        m_i = [IoU(box_T,i, gt_i) > IoU(region_i, gt_i)]

    One-stage: for every anchor i that is not ignored and every class c, with p of a sigmoid,

        classification  1/max(1, P) sum_ic a_ic tau^2 |p_T,ic - p_S,ic| BCE(p_S,ic, p_T,ic),
                        a_ic = [|p_T,ic - y_ic| < |p_S,ic - y_ic| - margin]

    and the same regression on its P foreground anchors, from its anchor. The factor |p_T - p_S|, constant to
    the gradient, keeps some hundred thousand easy negatives from outweighing the rest.

    Anchors in the batch's padding are what the student's own labels make of them: background for RetinaNet and FCOS,
    ignored by GFL. Denominators are the counts of regions or foreground and not of open gates, so that a student that
    overtakes the teacher is released rather than pushed harder. Deltas are those of class y_i, in the
    student's coder. A cascade's stages add up, as in its own loss. With other classes (``class_map``) the
    shared ones are compared, two-stage with the background and both sides normalised over these; regions and
    anchors whose label the teacher does not know give neither classification nor regression; where no class
    is shared, features alone are compared.

    Reads: ``student.features``, ``gt_instances``, ``regions`` or ``pred_logits``, ``pred_anchor_deltas``,
    ``anchors``, ``gt_labels``, ``matched_gt_boxes``; ``teacher.features``, ``regions`` or ``pred_logits``,
    ``pred_anchor_deltas``.

    Args:
        levels, adapter, mask: of the feature term, see :class:`ImitationLoss`.
        feature_weight, classification_weight, regression_weight: numbers or schedules; 0 removes a term
            and what it would ask of the teacher.
        cls_gate: "better" or "none".
        cls_margin: how much more probable the teacher must find the label.
        temperature: tau.
        background_weight: factor of background regions or anchors in the classification term.
        reg_gate: "proposal" (the teacher's box beats the region or anchor it started from; FCOS and GFL start
            from points, which have no box, so there it is "student"), "student" (it beats the student's box),
            "both", or "none".
        smooth_l1_beta: where the regression turns from square to absolute, in normalised deltas.
        feature_ramp: fraction of the run in which the feature term grows linearly to its weight, for its
            adapters begin at random. 500 iterations of a 90k schedule.
        weight: the decay; linear to 0 over the run unless given.
        across_processes: see :class:`~d2kd.losses.DistillLoss`.

    Raises:
        InputError: an unknown gate; on ``bind`` detectors of different kinds, with other anchors, with
            ``use_sigmoid_ce``, or with other classes whose names were not given.
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
        across_processes: bool = True,
    ):
        if weight is None:
            weight = LinearParamScheduler(1.0, 0.0)
        super().__init__(weight=weight, across_processes=across_processes)
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
            else ImitationLoss(
                levels=levels,
                mask=mask,
                adapter=adapter,
                weight=feature_weight,
                across_processes=across_processes,
            )
        )
        self.classification_weight = classification_weight
        self.regression_weight = regression_weight
        self._cls_settings = {
            "gate": cls_gate,
            "margin": cls_margin,
            "temperature": temperature,
            "background_weight": background_weight,
        }
        self.reg_gate, self.smooth_l1_beta = reg_gate, smooth_l1_beta
        self.ramp = _ramp(feature_ramp)

    @property
    def reads_predictions(self) -> bool:
        return not (is_off(self.classification_weight) and is_off(self.regression_weight))

    def bind(self, student: nn.Module, teacher: nn.Module) -> None:
        if self.feature is not None:
            self.feature.scale = self.scale
            self.feature.bind(student, teacher)
        if not self.reads_predictions:
            return
        if self.class_map is not None and not self.class_map.pairs:
            logger.warning("no class is shared: features alone are compared")
            self.classification_weight = self.regression_weight = 0
            return
        two_stage = {hasattr(detector, "roi_heads") for detector in (student, teacher)}
        if len(two_stage) == 2:
            raise InputError(
                "regions",
                f"student {type(student).__name__}, teacher {type(teacher).__name__}",
                "both with regions or both with anchors, or classification_weight=0 and "
                "regression_weight=0",
            )
        if two_stage == {True} and not is_off(self.classification_weight):
            for detector in (student, teacher):
                if scores_by_sigmoid(detector):
                    raise InputError(
                        "regions",
                        f"a {type(detector).__name__} with use_sigmoid_ce, whose classes have no softmax",
                        "box heads with softmax, or classification_weight=0",
                    )
        ours, theirs = map(num_classes_of, (student, teacher))
        if self.class_map is None and ours != theirs:
            raise InputError(
                "num_classes",
                f"student {ours}, teacher {theirs}",
                "the same classes, or the names of both: the teacher's and the Distiller's classes",
            )
        if two_stage == {False}:
            check_anchors(
                student,
                teacher,
                self.scale,
                "the same anchors, or classification_weight=0 and regression_weight=0",
            )

    def forward(self, student, teacher) -> dict[str, Tensor]:
        terms = {}
        if self.feature is not None:
            weight = value_of(self.feature.weight, self.progress)
            weight *= value_of(self.ramp, self.progress)
            if weight:
                terms["feature"] = weight * self.feature(student, teacher)
        for name in ("classification", "regression"):
            if weight := value_of(getattr(self, f"{name}_weight"), self.progress):
                if hasattr(student.detector, "roi_heads"):
                    of_regions = getattr(self, name)
                    stages = zip(student.regions, teacher.regions, strict=True)
                    term = sum(of_regions(ours, theirs) for ours, theirs in stages)
                else:
                    term = getattr(self, f"dense_{name}")(student, teacher)
                terms[name] = weight * term
        return terms

    def classification(self, student, teacher) -> Tensor:
        """The classification term of two ``Regions`` with equal boxes, unweighted."""
        ours, theirs = student.pred_class_logits, teacher.pred_class_logits
        labels = student.gt_classes
        if self.class_map is not None:
            labels = self.class_map.shared_labels(labels)
            ours, theirs = self.class_map.shared_logits(ours, theirs, background=True)
        (normalizer,) = self.normalizer((labels >= 0).sum())
        return classification_term(
            ours, theirs, labels, normalizer=normalizer, **self._cls_settings
        )

    def regression(self, student, teacher) -> Tensor:
        """The regression term of two ``Regions`` with equal boxes, unweighted."""
        num_classes = student.pred_class_logits.shape[1] - 1
        rows, known = self._foreground(student.gt_classes, num_classes)
        return self._regression(
            of_class(student.pred_proposal_deltas[rows], student.gt_classes[rows]),
            of_class(teacher.pred_proposal_deltas[rows], known),
            boxes=student.box_tensor[rows],
            gt=student.gt_boxes[rows],
            coder=student.box2box_transform,
            teacher_coder=teacher.box2box_transform,
        )

    def dense_classification(self, student, teacher) -> Tensor:
        """The classification term of two ``DenseOutputs`` with equal anchors, unweighted."""
        ours, theirs = (torch.cat(x.pred_logits, dim=1).flatten(0, 1) for x in (student, teacher))
        labels = student.gt_labels.flatten()
        if self.class_map is not None:
            labels = self.class_map.shared_labels(labels)
            ours, theirs = self.class_map.shared_logits(ours, theirs)
        (normalizer,) = self.normalizer(is_foreground(labels, ours.shape[1]).sum())
        return dense_classification_term(
            ours, theirs, labels, normalizer=normalizer, **self._cls_settings
        )

    def dense_regression(self, student, teacher) -> Tensor:
        """The regression term of two ``DenseOutputs`` with equal anchors, unweighted."""
        labels = student.gt_labels.flatten()
        rows, _ = self._foreground(labels, student.detector.num_classes)
        anchors = Boxes.cat(student.anchors).tensor
        ours, theirs = (
            torch.cat(x.pred_anchor_deltas, dim=1).flatten(0, 1)[rows] for x in (student, teacher)
        )
        return self._regression(
            ours,
            theirs,
            boxes=anchors[rows % len(anchors)],
            gt=student.matched_gt_boxes.flatten(0, 1)[rows],
            coder=student.detector.box2box_transform,
            teacher_coder=teacher.detector.box2box_transform,
        )

    def _foreground(self, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        """Rows of objects whose class the teacher knows, and the number it knows that class by."""
        foreground = is_foreground(labels, num_classes)
        if self.class_map is None:
            rows = torch.nonzero(foreground)[:, 0]
            return rows, labels[rows]
        shared = self.class_map.shared_labels(labels)
        rows = torch.nonzero(foreground & (shared >= 0))[:, 0]
        return rows, torch.tensor(self.class_map.of_teacher).to(labels)[shared[rows]]

    def _regression(self, ours, theirs, *, boxes, gt, coder, teacher_coder) -> Tensor:
        """The regression term of ``(P, 4)`` deltas of the same boxes."""
        theirs = theirs.to(ours.dtype)
        with torch.no_grad():
            # Detectron2's coders want float32, which half-precision deltas are not.
            teacher_boxes = teacher_coder.apply_deltas(theirs.float(), boxes)
            if not _same_coder(coder, teacher_coder):
                # Another coder: said again in the student's own units.
                theirs = coder.get_deltas(boxes, teacher_boxes)
            gt = Boxes(gt)
            iou = matched_pairwise_iou(Boxes(teacher_boxes), gt)
            gate = torch.ones_like(iou, dtype=torch.bool)
            points = isinstance(coder, Box2BoxTransformLinear)
            if self.reg_gate in ("proposal", "both") and not points:
                gate &= iou > matched_pairwise_iou(Boxes(boxes), gt)
            if self.reg_gate in ("student", "both") or (self.reg_gate == "proposal" and points):
                own_boxes = coder.apply_deltas(ours.float(), boxes)
                gate &= iou > matched_pairwise_iou(Boxes(own_boxes), gt)
        (normalizer,) = self.normalizer(gate.new_full((), len(gate), dtype=torch.float32))
        return regression_term(ours, theirs, gate, beta=self.smooth_l1_beta, normalizer=normalizer)


def _same_coder(one, other) -> bool:
    settings = [
        {k: tuple(v) if k == "weights" else v for k, v in vars(c).items()} for c in (one, other)
    ]
    return type(one) is type(other) and settings[0] == settings[1]


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
    normalizer: Tensor | None = None,
) -> Tensor:
    """``1/R sum_i w_i a_i tau^2 KL(p_T,i || p_S,i)``.

    Args:
        student_logits, teacher_logits: ``(R, K + 1)``, background last.
        gt_classes: ``(R,)`` in ``[0, K]``; a negative label is ignored, in the denominator too.
        normalizer: in place of R.
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
    return (divergence * weight).sum() / at_least_one(known.sum(), normalizer)


@in_float32
def dense_classification_term(
    student_logits: Tensor,
    teacher_logits: Tensor,
    gt_classes: Tensor,
    *,
    gate: str = "better",
    margin: float = 0.0,
    temperature: float = 1.0,
    background_weight: float = 1.0,
    normalizer: Tensor | None = None,
) -> Tensor:
    """``1/max(1, P) sum_ic w_i a_ic tau^2 |p_T,ic - p_S,ic| BCE(p_S,ic, p_T,ic)``.

    Args:
        student_logits, teacher_logits: ``(M, K)`` of M anchors, before the sigmoid.
        gt_classes: ``(M,)`` in ``[0, K]``, K background; P of them are foreground, a negative one is ignored.
        normalizer: in place of max(1, P).
    """
    num_classes = student_logits.shape[1]
    divergence, ours, theirs = sigmoid_divergence(student_logits, teacher_logits, temperature)
    with torch.no_grad():
        known = gt_classes >= 0
        foreground = is_foreground(gt_classes, num_classes)
        weight = torch.where(foreground, 1.0, background_weight) * known
        weight = weight[:, None].expand_as(divergence)
        if gate == "better":
            # Nearer to 0, except for the object's own class; without targets, which are as large as the logits.
            nearer = theirs < ours - margin
            label = gt_classes.clamp(0, num_classes - 1)[:, None]
            p_t, p_s = theirs.gather(1, label), ours.gather(1, label)
            own = torch.where(foreground[:, None], p_t > p_s + margin, p_t < p_s - margin)
            nearer.scatter_(1, label, own)
            weight = weight * nearer
    return (divergence * weight).sum() / at_least_one(foreground.sum(), normalizer)


@in_float32
def regression_term(
    student: Tensor,
    teacher: Tensor,
    gate: Tensor,
    *,
    beta: float = 1.0,
    normalizer: Tensor | None = None,
) -> Tensor:
    """``1/max(1, P) sum_i m_i sum_4 smooth_l1``; ``(P, 4)`` deltas of foreground rows, ``(P,)`` gate.

    A normalizer stands in place of max(1, P).
    """
    errors = F.smooth_l1_loss(student, teacher.detach(), reduction="none", beta=beta).sum(dim=1)
    return (errors * gate).sum() / at_least_one(errors.new_full((), len(errors)), normalizer)


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
