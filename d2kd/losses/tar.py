"""Task Adaptive Regularization: distill where the teacher predicts better than the student.

TAR, "Distilling Object Detectors with Task Adaptive Regularization", arXiv 2006.13108. Only its abstract and
descriptions in other papers were available, so this is *TAR as implemented here*. Known from these sources: shared
proposals, three terms, the Gaussian mask, the regression gate and the decay. Chosen by this project: the constants of
the formulas, the classification gate, the weights, the mask term, and the whole one-stage form.

Notation: K classes, R sampled regions, M anchors, P foreground regions or anchors, p_S and p_T the probabilities of
student and teacher, t_S and t_T their box deltas, q_S and q_T the probabilities of a mask's pixels, tau the temperature.
"""

from __future__ import annotations

import logging
from typing import Any

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

from ..layers.adapter import LevelChoice
from ..modeling.anchors import check_anchors
from ..modeling.atss import is_foreground
from ..modeling.box_regression import select_class_deltas
from ..modeling.outputs import MaskRegions, has_mask_regions, uses_sigmoid_scores
from ..structures.class_map import check_same_classes
from ..utils.errors import InputError
from .base import DistillLoss, Weight, get_weight, is_zero
from .dense import labels_of
from .functional import in_float32, resolve_normalizer, sigmoid_divergence, softmax_kl
from .imitation import ImitationLoss
from .regions import shared_region_logits

logger = logging.getLogger(__name__)

CLS_GATES = ("better", "none")
REG_GATES = ("proposal", "student", "both", "none")
MASK_GATES = ("better", "none")


class TARLoss(DistillLoss):
    """Distillation of features, classification, box regression and masks, each where the teacher is better.

    Two-stage detectors: for the student's R sampled regions with labels y,

        feature         :class:`ImitationLoss` under Gaussian box masks
        classification  1/R sum_i a_i tau^2 KL(p_T,i || p_S,i),    a_i = [p_T,i(y_i) > p_S,i(y_i) + margin]
        regression      1/max(1, P) sum_i m_i sum_4 smooth_l1(t_S,i - t_T,i),
                        m_i = [IoU(box_T,i, gt_i) > IoU(region_i, gt_i)]
        mask            1/max(1, P) sum_i b_i mean_xy KL(q_T,ixy || q_S,ixy),
                        b_i = [IoU(q_T,i > 0.5, gt_i) > IoU(q_S,i > 0.5, gt_i)]

    The mask term is this project's; the paper has none. It is computed if both detectors have a mask head, for the regions
    that the student's was trained with, on the student's grid. Its gradient is that of the binary cross-entropy with the
    teacher's probabilities as targets. Masks are those of class y_i, or of a class-agnostic head.

    One-stage detectors: for every anchor i that is not ignored and every class c, with sigmoid probabilities p,

        classification  1/max(1, P) sum_ic a_ic tau^2 |p_T,ic - p_S,ic| BCE(p_S,ic, p_T,ic),
                        a_ic = [|p_T,ic - y_ic| < |p_S,ic - y_ic| - margin]

    and the same regression term on the P foreground anchors. The factor |p_T - p_S| carries no gradient. It keeps
    the many easy negatives from dominating.

    Denominators count regions or foreground anchors, not open gates. Otherwise a student that overtakes the teacher
    would get larger gradients at the remaining gates. Deltas are those of class y_i, in the student's box coder. The
    stages of a cascade are summed, as in its own loss. Anchors in the padding keep the student's labels: background in
    RetinaNet and FCOS, ignored in GFL.

    If the class lists differ (``class_map``), the shared classes are compared; for two-stage detectors the softmax is
    over these and the background. Regions and anchors whose class the teacher does not have contribute to neither
    classification nor regression, nor to the mask term, unless the teacher's masks are class-agnostic. If no class is
    shared, only features are compared.

    In unlabelled images, the classification term has no gates, and the teacher's most probable class takes the place of the
    label: for two-stage detectors background included, for others background where no class is above 1/2. There is no
    regression or mask term, and a feature term with ``mask="none"`` alone. This is this project's choice, as are gates and weights.

    Reads: ``student.features``, ``gt_instances``, ``regions`` and ``mask_regions`` or ``pred_logits``,
    ``pred_anchor_deltas``, ``anchors``, ``gt_labels``, ``matched_gt_boxes``; ``teacher.features``, ``regions`` and
    ``mask_regions`` or ``pred_logits``, ``pred_anchor_deltas``.

    Args:
        levels, adapter, mask, normalize: options of the feature term, see :class:`ImitationLoss`.
        feature_weight, classification_weight, regression_weight, mask_weight: numbers or schedules. A term with weight
            0 is not computed, and the teacher's outputs for it are not either.
        cls_gate: "better" (the gates a above) or "none".
        cls_margin: margin of the "better" gate.
        temperature: tau.
        background_weight: factor of background regions or anchors in the classification term.
        reg_gate: "proposal" (the teacher's box has a higher IoU than the region or anchor it refines; for FCOS and
            GFL, which refine points, the same as "student"), "student" (it has a higher IoU than the student's box),
            "both", or "none".
        mask_gate: "better" (the gates b above) or "none".
        smooth_l1_beta: threshold between the L2 and L1 parts of the regression term, in normalised deltas.
        feature_ramp: fraction of the run in which the feature term increases linearly to its weight, because its
            adapters start from random weights. The default is 500 iterations of a 90k schedule.
        weight: a number or a schedule. None: linear decay from 1 to 0 over the run.
        across_processes: see :class:`~d2kd.losses.DistillLoss`.

    Raises:
        InputError: if a gate is unknown. In ``setup``: if one detector is two-stage and the other one-stage, if anchors
            differ, if a box head has ``use_sigmoid_ce``, or if classes differ and their names were not given.

    Example:
        >>> from d2kd.testing import batch, distiller, forward_losses, tiny_faster_rcnn
        >>> model = distiller(TARLoss, tiny_faster_rcnn, same=True)  # the teacher is a copy
        >>> {key: value.item() for key, value in forward_losses(model, batch()).items() if key.startswith("distill/")}
        {'distill/loss_loss_feature': 0.0, 'distill/loss_loss_classification': 0.0, 'distill/loss_loss_regression': 0.0}
    """

    def __init__(
        self,
        *,
        levels: LevelChoice = None,
        mask: str = "gaussian",
        adapter: str = "auto",
        normalize: bool = True,
        feature_weight: Weight = 0.3,
        classification_weight: Weight = 10.0,
        regression_weight: Weight = 0.3,
        mask_weight: Weight = 1.0,
        cls_gate: str = "better",
        cls_margin: float = 0.0,
        temperature: float = 1.0,
        background_weight: float = 1.0,
        reg_gate: str = "proposal",
        mask_gate: str = "better",
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
            ("mask_gate", mask_gate, MASK_GATES),
        ):
            if gate not in gates:
                raise InputError(culprit, gate, " or ".join(gates))
        # The feature term is an ImitationLoss. Its weight is applied in forward(), like those of the other terms.
        self.feature = (
            None
            if is_zero(feature_weight)
            else ImitationLoss(
                levels=levels,
                mask=mask,
                adapter=adapter,
                normalize=normalize,
                weight=feature_weight,
                across_processes=across_processes,
            )
        )
        self.classification_weight = classification_weight
        self.regression_weight = regression_weight
        self.mask_weight = mask_weight
        self._cls_settings = {
            "gate": cls_gate,
            "margin": cls_margin,
            "temperature": temperature,
            "background_weight": background_weight,
        }
        self.reg_gate, self.smooth_l1_beta = reg_gate, smooth_l1_beta
        self.mask_gate = mask_gate
        self.ramp = _ramp(feature_ramp)

    @property
    def needs_ground_truth(self) -> bool:
        feature = self.feature is not None and not self.feature.needs_ground_truth
        return is_zero(self.classification_weight) and not feature

    @property
    def reads_predictions(self) -> bool:
        weights = self.classification_weight, self.regression_weight, self.mask_weight
        return not all(map(is_zero, weights))

    def setup(self, student: nn.Module, teacher: nn.Module) -> None:
        if self.feature is not None:
            self.feature.scale = self.scale
            self.feature.setup(student, teacher)
        if not (has_mask_regions(student) and has_mask_regions(teacher)):
            self.mask_weight = 0
        if not self.reads_predictions:
            return
        if self.class_map is not None and not self.class_map.pairs:
            logger.warning("student and teacher share no class: only features are compared")
            self.classification_weight = self.regression_weight = self.mask_weight = 0
            return
        two_stage = {hasattr(detector, "roi_heads") for detector in (student, teacher)}
        if len(two_stage) == 2:
            raise InputError(
                "regions",
                f"student {type(student).__name__}, teacher {type(teacher).__name__}",
                "both with regions or both with anchors, or classification_weight=0 and "
                "regression_weight=0",
            )
        if two_stage == {True} and not is_zero(self.classification_weight):
            for detector in (student, teacher):
                if uses_sigmoid_scores(detector):
                    raise InputError(
                        "regions",
                        f"a {type(detector).__name__} with use_sigmoid_ce, whose classes have no softmax",
                        "box heads with softmax, or classification_weight=0",
                    )
        if two_stage == {False}:
            check_anchors(
                student,
                teacher,
                self.scale,
                "the same anchors, or classification_weight=0 and regression_weight=0",
            )
        check_same_classes(student, teacher, self.class_map)

    def forward(self, student, teacher) -> dict[str, Tensor]:
        terms, labelled = {}, student.is_labelled
        if self.feature is not None and (labelled or not self.feature.needs_ground_truth):
            weight = get_weight(self.feature.weight, self.progress)
            weight *= get_weight(self.ramp, self.progress)
            if weight:
                terms["feature"] = weight * self.feature(student, teacher)
        for name in ("classification", "regression") if labelled else ("classification",):
            if weight := get_weight(getattr(self, f"{name}_weight"), self.progress):
                if hasattr(student.detector, "roi_heads"):
                    stages = zip(student.regions, teacher.regions, strict=True)
                    term = sum(getattr(self, name)(s, t) for s, t in stages)
                else:
                    term = getattr(self, f"dense_{name}")(student, teacher)
                terms[name] = weight * term
        if labelled and (weight := get_weight(self.mask_weight, self.progress)):
            terms["mask"] = weight * self.masks(student.mask_regions, teacher.mask_regions)
        return terms

    def classification(self, student, teacher) -> Tensor:
        """Return the unweighted classification term of two ``Regions`` with equal boxes."""
        s, t, labels = shared_region_logits(student, teacher, self.class_map)
        settings = self._settings(labelled=student.gt_classes is not None)
        (normalizer,) = self.normalizer((labels >= 0).sum())
        return classification_term(s, t, labels, normalizer=normalizer, **settings)

    def _settings(self, labelled: bool) -> dict[str, Any]:
        """Return the options of the classification term, without gates where there are no labels."""
        return self._cls_settings if labelled else {**self._cls_settings, "gate": "none"}

    def regression(self, student, teacher) -> Tensor:
        """Return the unweighted regression term of two ``Regions`` with equal boxes."""
        num_classes = student.pred_class_logits.shape[1] - 1
        # All regions, of which few are no foreground: to select them would wait for their number.
        foreground, classes, teacher_classes = self._foreground(student.gt_classes, num_classes)
        return self._regression(
            select_class_deltas(student.pred_proposal_deltas, classes),
            select_class_deltas(teacher.pred_proposal_deltas, teacher_classes),
            foreground,
            boxes=student.box_tensor,
            gt=student.gt_boxes,
            coder=student.box2box_transform,
            teacher_coder=teacher.box2box_transform,
        )

    def masks(self, student: MaskRegions, teacher: MaskRegions) -> Tensor:
        """Return the unweighted mask term of regions with equal boxes."""
        labels = student.gt_classes
        rows, teacher_classes = torch.ones_like(labels, dtype=torch.bool), labels
        if self.class_map is not None and not teacher.class_agnostic:
            num_classes = len(self.class_map.student)
            rows, _, teacher_classes = self._foreground(labels, num_classes)
        return mask_term(
            student.select(labels),
            teacher.select(teacher_classes),
            rows,
            None if self.mask_gate == "none" else student.gt_masks,
            normalizer=self.normalizer(rows.sum())[0],
        )

    def dense_classification(self, student, teacher) -> Tensor:
        """Return the unweighted classification term of two ``DenseOutputs`` with equal anchors."""
        s, t = (torch.cat(x.pred_logits, dim=1).flatten(0, 1) for x in (student, teacher))
        labels = student.gt_labels.flatten() if student.is_labelled else None
        if self.class_map is not None:
            labels = None if labels is None else self.class_map.map_labels(labels)
            s, t = self.class_map.shared_logits(s, t)
        if labels is None:
            labels = labels_of(t)
        settings = self._settings(student.is_labelled)
        (normalizer,) = self.normalizer(is_foreground(labels, s.shape[1]).sum())
        return dense_classification_term(s, t, labels, normalizer=normalizer, **settings)

    def dense_regression(self, student, teacher) -> Tensor:
        """Return the unweighted regression term of two ``DenseOutputs`` with equal anchors."""
        labels = student.gt_labels.flatten()
        foreground, _, _ = self._foreground(labels, student.detector.num_classes)
        rows = torch.nonzero(foreground)[:, 0]  # few of the anchors
        anchors = Boxes.cat(student.anchors).tensor
        return self._regression(
            student.select_anchor_deltas(rows),
            teacher.select_anchor_deltas(rows),
            torch.ones_like(rows, dtype=torch.bool),
            boxes=anchors[rows % len(anchors)],
            gt=student.matched_gt_boxes.flatten(0, 1)[rows],
            coder=student.detector.box2box_transform,
            teacher_coder=teacher.detector.box2box_transform,
        )

    def _foreground(self, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return a mask of the foreground rows whose class the teacher has, and both sides' classes, elsewhere 0."""
        foreground = is_foreground(labels, num_classes)
        if self.class_map is None:
            classes = labels.where(foreground, 0)
            return foreground, classes, classes
        shared = self.class_map.map_labels(labels)
        foreground = foreground & (shared >= 0)
        teacher_ids = torch.tensor(self.class_map.teacher_ids).to(labels, non_blocking=True)
        return (
            foreground,
            labels.where(foreground, 0),
            teacher_ids[shared.where(foreground, 0)],
        )

    def _regression(self, student, teacher, rows, *, boxes, gt, coder, teacher_coder) -> Tensor:
        """Return the regression term of ``(R, 4)`` deltas relative to the same boxes, in the rows of a mask ``(R,)``."""
        teacher = teacher.to(student.dtype)
        with torch.no_grad():
            # Detectron2's box coders need float32.
            teacher_boxes = teacher_coder.apply_deltas(teacher.float(), boxes)
            if not _same_coder(coder, teacher_coder):
                teacher = coder.get_deltas(boxes, teacher_boxes)  # deltas in the student's coder
            gt = Boxes(gt)
            iou = matched_pairwise_iou(Boxes(teacher_boxes), gt)
            gate = rows.clone()
            points = isinstance(coder, Box2BoxTransformLinear)
            if self.reg_gate in ("proposal", "both") and not points:
                gate &= iou > matched_pairwise_iou(Boxes(boxes), gt)
            if self.reg_gate in ("student", "both") or (self.reg_gate == "proposal" and points):
                student_boxes = coder.apply_deltas(student.float(), boxes)
                gate &= iou > matched_pairwise_iou(Boxes(student_boxes), gt)
        (normalizer,) = self.normalizer(rows.sum())
        # Other rows have any values, and 0 times infinity is no number.
        student, teacher = (x.where(rows[:, None], 0) for x in (student, teacher))
        return regression_term(
            student, teacher, gate, beta=self.smooth_l1_beta, normalizer=normalizer
        )


def _same_coder(a, b) -> bool:
    settings = [
        {k: tuple(v) if k == "weights" else v for k, v in vars(coder).items()} for coder in (a, b)
    ]
    return type(a) is type(b) and settings[0] == settings[1]


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
    """Return ``1/R sum_i w_i a_i tau^2 KL(p_T,i || p_S,i)``, with gates a and w the background weight or 1.

    Args:
        student_logits, teacher_logits: ``(R, K + 1)``, background last.
        gt_classes: ``(R,)`` in ``[0, K]``. Negative labels are ignored and not counted in R.
        normalizer: replaces R.

    Example:
        >>> student, teacher = torch.zeros(1, 2), torch.tensor([[2.0, 0.0]])  # the teacher prefers class 0
        >>> [round(classification_term(student, teacher, torch.tensor([k])).item(), 4) for k in (0, 1)]
        [0.3278, 0.0]
    """
    valid = gt_classes >= 0
    divergence = softmax_kl(student_logits, teacher_logits, temperature)
    with torch.no_grad():
        weight = valid.to(divergence.dtype)
        weight = torch.where(
            gt_classes == student_logits.shape[1] - 1, weight * background_weight, weight
        )
        if gate == "better":
            label = gt_classes.clamp(min=0)[:, None]
            p_s, p_t = (
                F.softmax(x / temperature, dim=1).gather(1, label)[:, 0]
                for x in (student_logits, teacher_logits)
            )
            weight = weight * (p_t > p_s + margin)
    return (divergence * weight).sum() / resolve_normalizer(valid.sum(), normalizer)


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
    """Return ``1/max(1, P) sum_ic w_i a_ic tau^2 |p_T,ic - p_S,ic| BCE(p_S,ic, p_T,ic)``.

    Args:
        student_logits, teacher_logits: ``(M, K)``, before the sigmoid.
        gt_classes: ``(M,)`` in ``[0, K]``, K is background, P labels are foreground, negative ones are ignored.
        normalizer: replaces max(1, P).
    """
    num_classes = student_logits.shape[1]
    divergence, p_s, p_t = sigmoid_divergence(student_logits, teacher_logits, temperature)
    with torch.no_grad():
        foreground = is_foreground(gt_classes, num_classes)
        weight = torch.where(foreground, 1.0, background_weight) * (gt_classes >= 0)
        weight = weight[:, None].expand_as(divergence)
        if gate == "better":
            # The target is 1 for the label's class and 0 for others. A target tensor would be as large as the logits.
            better = p_t < p_s - margin
            label = gt_classes.clamp(0, num_classes - 1)[:, None]
            s, t = p_s.gather(1, label), p_t.gather(1, label)
            at_label = torch.where(foreground[:, None], t > s + margin, t < s - margin)
            better.scatter_(1, label, at_label)
            weight = weight * better
    return (divergence * weight).sum() / resolve_normalizer(foreground.sum(), normalizer)


@in_float32
def regression_term(
    student: Tensor,
    teacher: Tensor,
    gate: Tensor,
    *,
    beta: float = 1.0,
    normalizer: Tensor | None = None,
) -> Tensor:
    """Return ``1/max(1, P) sum_i m_i sum_4 smooth_l1(t_S,i - t_T,i)``.

    Args:
        student, teacher: ``(P, 4)`` deltas of foreground rows.
        gate: ``(P,)``.
        normalizer: replaces max(1, P).
    """
    errors = F.smooth_l1_loss(student, teacher.detach(), reduction="none", beta=beta).sum(dim=1)
    return (errors * gate).sum() / resolve_normalizer(errors.new_full((), len(errors)), normalizer)


@in_float32
def mask_term(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor,
    gt_masks: Tensor | None = None,
    *,
    normalizer: Tensor | None = None,
) -> Tensor:
    """Return ``1/max(1, P) sum_i b_i mean_xy KL(q_T,ixy || q_S,ixy)``.

    Args:
        student: logits of masks ``(F, M, M)``.
        teacher: ``(F, N, N)``. Its probabilities are resized to the student's grid if N is not M.
        rows: ``(F,)`` bool, the P rows that are compared.
        gt_masks: ``(F, M, M)`` bool, for the gates b. None: they are 1.
        normalizer: replaces max(1, P).

    Example:
        >>> student, teacher = torch.zeros(1, 2, 2), torch.full((1, 2, 2), 2.0)
        >>> rows, whole = torch.tensor([True]), torch.ones(1, 2, 2, dtype=torch.bool)
        >>> [round(mask_term(student, teacher, rows, target).item(), 4) for target in (whole, ~whole)]
        [0.3278, 0.0]
    """
    with torch.no_grad():
        target = teacher.sigmoid()
        if target.shape != student.shape:
            # With a row more, because a tensor without rows cannot be resized.
            padded = F.pad(target, (0, 0, 0, 0, 0, 1))[:, None]
            resized = F.interpolate(padded, student.shape[1:], mode="bilinear", antialias=True)
            target = resized[:-1, 0].clamp(0, 1)
        gate = rows
        if gt_masks is not None:
            gate = gate & (_mask_iou(target > 0.5, gt_masks) > _mask_iou(student > 0, gt_masks))
        entropy = torch.special.entr(target) + torch.special.entr(1 - target)
    divergence = F.binary_cross_entropy_with_logits(student, target, reduction="none") - entropy
    return (divergence.mean(dim=(1, 2)) * gate).sum() / resolve_normalizer(rows.sum(), normalizer)


def _mask_iou(masks: Tensor, others: Tensor) -> Tensor:
    """Return the IoU ``(F,)`` of the rows of two tensors of masks ``(F, M, M)``, bool; 0 where both are empty."""
    intersection, union = (x.sum(dim=(1, 2)) for x in (masks & others, masks | others))
    return intersection / union.clamp(min=1)


def _ramp(length: float):
    """Return a schedule from 0 to 1 over the first ``length`` of the run, then 1."""
    if not 0 <= length < 1:
        raise InputError("feature_ramp", length, "a fraction of the run, from 0 to less than 1")
    if length == 0:
        return ConstantParamScheduler(1.0)
    return CompositeParamScheduler(
        [LinearParamScheduler(0.0, 1.0), ConstantParamScheduler(1.0)],
        lengths=[length, 1 - length],
        interval_scaling=["rescaled", "fixed"],
    )
