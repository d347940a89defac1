"""CrossKD: the teacher's head finishes what the student's head has begun."""

from __future__ import annotations

import logging

import torch
from detectron2.modeling.box_regression import Box2BoxTransformLinear
from detectron2.structures import Boxes
from torch import Tensor, nn

from ..layers.focal_losses import quality_focal_loss
from ..modeling.atss import is_foreground
from ..modeling.box_regression import generalized_iou_loss
from ..modeling.outputs import DenseOutputs
from ..structures.class_map import num_shared_classes
from ..utils.errors import InputError
from .base import Weight
from .dense import DenseLoss, Tower, decode_boxes, positives_per_image, tower_adapters, tower_of
from .functional import softmax_kl

logger = logging.getLogger(__name__)

TOWERS = {"cls_subnet": "cls_score", "bbox_subnet": "bbox_pred"}
"""The towers of a head, and the layer that predicts from each."""
DEFAULTS = {"gfl": (3, 1.0, 4.0), "retinanet": (3, 1.0, 1.0), "fcos": (2, 0.4, 0.75)}
"""By family: the joint and the weights of the class and the box term."""


class CrossKDLoss(DenseLoss):
    """Compare the teacher's predictions with those that its head makes of the student's features.

    CrossKD, "CrossKD: Cross-Head Knowledge Distillation for Object Detection", CVPR 2024 (arXiv 2306.11369). The map after
    i blocks of a tower of the student's head, before its ReLU, goes through the rest of the teacher's tower and its
    predictor. These cross predictions imitate the teacher's own, so the student's own predictions learn from ground
    truth alone. Before, the map gets the teacher's mean and standard deviation, channel by channel over a level's batch:

        (f_S - mean(f_S)) / (std(f_S) + 1e-6) std(f_T) + mean(f_T)

    A level with one value in each channel is left as it is. With p^ and p~ the class scores of the cross predictions and of
    the teacher, c_a = max_k p~_ak, over all anchors a that are not ignored:

        class  w_c / Z sum_a sum_k |p^_ak - p~_ak| BCE(p^_ak, p~_ak),   also the factor carries gradient
        box    GFL        w_b / sum_a c_a  sum_a c_a mean over edges of tau^2 KL(teacher || cross)
               RetinaNet  w_b / Z  sum_a c_a (1 - GIoU(cross box, teacher's box))
               FCOS       w_b / Z  sum_a c_a (-log IoU(cross box, teacher's box))
        Z      sum over images of max(1, foreground anchors); for FCOS the sum of their centerness, at least 1

    Here FCOS's Z is at least 1, published is 1e-6, which is too small for a batch without objects. Anchors at which the
    teacher's box is empty have no box term. Where the towers differ in width, a 1x1 convolution shared by all levels,
    which is not in the paper, brings the student's map to the teacher's width.

    In unlabelled images, Z counts the anchors at which the teacher's highest score is above 1/2, for FCOS by its centerness,
    and every anchor counts. This is this project's choice.

    The gradient jumps where both predictions are equal, as that of an absolute value: it does not fade near the teacher.

    If the class lists differ (``class_map``), the shared classes are compared, and anchors of objects of other classes
    do not count.

    Reads: the maps of the towers on both sides; ``student.anchors``, ``gt_labels``, for FCOS ``matched_gt_boxes``;
    ``teacher.pred_logits``, ``pred_distributions`` or ``pred_anchor_deltas``; with joint 0 ``features`` of both.

    Args:
        joint: i, the number of the student's blocks; 0 is the feature pyramid. None: 3, and 2 for FCOS, if every tower has
            more blocks, otherwise one less than the shortest has.
        class_weight, box_weight: w_c, w_b. None: 1 and 4 for GFL, 1 and 1 for RetinaNet, 0.4 and 0.75 for FCOS.
        temperature: tau, for GFL.
        weight: a number or a schedule.
        across_processes: see :class:`~d2kd.losses.DistillLoss`.

    Raises:
        InputError: in ``setup``, if a head has no towers ``cls_subnet`` and ``bbox_subnet``, or one of fewer than ``joint``
            blocks; see also :class:`~d2kd.losses.dense.DenseLoss`.

    Example:
        >>> from d2kd.testing import batch, distiller, forward_losses, tiny_gfl
        >>> losses = forward_losses(distiller(CrossKDLoss, tiny_gfl), batch())
        >>> [key for key in losses if key.startswith("distill/")]
        ['distill/loss_loss_class', 'distill/loss_loss_box']
    """

    needs_ground_truth = False

    def __init__(
        self,
        *,
        joint: int | None = None,
        class_weight: float | None = None,
        box_weight: float | None = None,
        temperature: float = 1.0,
        weight: Weight = 1.0,
        across_processes: bool = True,
    ):
        super().__init__(weight=weight, across_processes=across_processes)
        self.joint, self.temperature = joint, temperature
        self.class_weight, self.box_weight = class_weight, box_weight
        self.align = True

    def setup(self, student: nn.Module, teacher: nn.Module) -> None:
        super().setup(student, teacher)
        self.family = "retinanet"
        if hasattr(teacher.head, "reg_max"):
            self.family = "gfl"
        elif isinstance(teacher.box2box_transform, Box2BoxTransformLinear):
            self.family = "fcos"
        joint, class_weight, box_weight = DEFAULTS[self.family]
        if self.class_weight is None:
            self.class_weight = class_weight
        if self.box_weight is None:
            self.box_weight = box_weight
        self.towers: dict[str, tuple[Tower, Tower]] = {
            name: (tower_of(student, name), tower_of(teacher, name)) for name in TOWERS
        }
        blocks = min(tower.blocks for pair in self.towers.values() for tower in pair)
        if self.joint is None:
            self.joint = min(joint, max(blocks - 1, 0))
            if self.joint < joint:
                logger.info("CrossKD joins after %d blocks, as towers have %d", self.joint, blocks)
        elif not 0 <= self.joint <= blocks:
            raise InputError("joint", self.joint, f"from 0 to {blocks}, the blocks of a tower")
        self.adapters = tower_adapters(self.towers, self.joint)
        if self.joint:
            pairs = self.towers.values()
            self.taps = tuple(s.before_relu(self.joint) for s, _ in pairs)
            self.teacher_taps = tuple(t.before_relu(self.joint) for _, t in pairs)

    def make_identity(self) -> None:
        """Leave the student's maps as they are. Their statistics, even if equal to the teacher's, change the last bits."""
        self.align = False

    def forward(self, student, teacher) -> dict[str, Tensor]:
        labels = self.known_labels(student, teacher)
        positive = is_foreground(labels, num_shared_classes(student.detector, self.class_map))
        if self.family == "fcos":
            if student.is_labelled:
                centers = centerness(student)
            else:
                centers = torch.cat(teacher.pred_centerness, dim=1)[..., 0].sigmoid()
            (normalizer,) = self.normalizer(centers.where(positive, 0).sum())
        else:
            (normalizer,) = self.normalizer(positives_per_image(positive))
        cross = self.cross_outputs(student, teacher)
        return self.terms(cross, teacher, student.anchors, labels >= 0, normalizer)

    def cross_outputs(self, student, teacher) -> DenseOutputs:
        """Return the outputs of the teacher's head for the student's maps."""
        maps = {}
        for name, (s, t) in self.towers.items():
            pairs = zip(s.maps(student, self.joint), t.maps(teacher, self.joint), strict=True)
            maps[name] = [self.aligned(self.adapters[name](x), target) for x, target in pairs]
        with teacher.autocast_context():
            predictions = self.predict(teacher.detector.head, maps)
        return DenseOutputs(teacher.detector, [], predictions=predictions)

    def aligned(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the student's map ``(N, C, H, W)`` with the teacher's mean and standard deviation in each channel."""
        student, teacher = student.float(), teacher.float()
        if not self.align or student.numel() == student.shape[1]:
            return student
        (s_std, s_mean), (t_std, t_mean) = (_statistics(x) for x in (student, teacher))
        return (student - s_mean) / (s_std + 1e-6) * t_std + t_mean

    def predict(
        self, head: nn.Module, maps: dict[str, list[Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return what the rest of a head predicts from the maps of its towers: class logits and box outputs by level."""
        # In the order of levels, on which norms with statistics of each level depend.
        classes, boxes = (
            [getattr(head, TOWERS[name])(tower.rest(head, self.joint)(x)) for x in maps[name]]
            for name, (_, tower) in self.towers.items()
        )
        if hasattr(head, "scales"):
            boxes = [x.float() * scale for x, scale in zip(boxes, head.scales, strict=True)]
        return classes, boxes

    def terms(
        self,
        cross: DenseOutputs,
        teacher: DenseOutputs,
        anchors: list[Boxes],
        used: Tensor,
        normalizer: Tensor,
        skip_empty: bool = True,
    ) -> dict[str, Tensor]:
        """Return the terms "class" and "box".

        Args:
            cross, teacher: outputs with the cross predictions and the teacher's own.
            anchors: boxes of each level.
            used: ``(N, R)``, the anchors that count.
            normalizer: Z.
            skip_empty: whether anchors at which the teacher's box is empty have no box term. In published code they have.
        """
        logits, own = (
            self.shared_classes(torch.cat(x.pred_logits, dim=1), "teacher")
            for x in (cross, teacher)
        )
        p = own.sigmoid()
        classes = quality_focal_loss(logits, p, beta=1.0).sum(dim=-1).where(used, 0)
        confidence = p.amax(dim=-1).where(used, 0)
        if self.family == "gfl":
            edges, own_edges = (torch.cat(x.pred_distributions, dim=1) for x in (cross, teacher))
            distance = softmax_kl(edges, own_edges, self.temperature).mean(dim=-1)
            (box_normalizer,) = self.normalizer(confidence.sum(), min_total=1e-6)
        else:
            boxes, own_boxes = (
                decode_boxes(
                    teacher.detector,
                    torch.cat(x.pred_anchor_deltas, dim=1),
                    anchors,
                    at_origin=True,
                ).flatten(0, 1)
                for x in (cross, teacher)
            )
            compare = iou_loss if self.family == "fcos" else generalized_iou_loss
            if skip_empty:
                has_area = (own_boxes[:, 2:] > own_boxes[:, :2]).all(dim=1)
                confidence = confidence.where(has_area.view_as(confidence), 0)
            distance, box_normalizer = compare(boxes, own_boxes).view_as(confidence), normalizer
        return {
            "class": self.class_weight * classes.sum() / normalizer,
            "box": self.box_weight * (confidence * distance).sum() / box_normalizer,
        }


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the standard deviation and the mean of each channel, ``(1, C, 1, 1)`` each."""
    variance, mean = torch.var_mean(x, dim=(0, 2, 3), keepdim=True)
    return variance.clamp(min=1e-24).sqrt(), mean  # the root of 0 has no gradient


def iou_loss(boxes: Tensor, targets: Tensor, eps: float = 1e-6) -> Tensor:
    """Return ``-log IoU`` of the rows of two tensors of boxes ``(P, 4)``, XYXY, with an IoU of at least ``eps``."""
    sides = torch.min(boxes[:, 2:], targets[:, 2:]) - torch.max(boxes[:, :2], targets[:, :2])
    intersection = sides.clamp(min=0).prod(dim=1)
    area, target_area = ((x[:, 2:] - x[:, :2]).prod(dim=1) for x in (boxes, targets))
    iou = intersection / (area + target_area - intersection).clamp(min=eps)
    return -iou.clamp(min=eps).log()


def centerness(student) -> Tensor:
    """Return FCOS's target of the centerness, ``(N, R)``: 1 at the center of the matched box, 0 at its border or outside."""
    matched = student.matched_gt_boxes
    anchors = Boxes.cat(student.anchors).tensor.repeat(len(matched), 1)
    deltas = student.detector.box2box_transform.get_deltas(anchors, matched.flatten(0, 1))
    sides = deltas.view(*matched.shape[:2], 2, 2).clamp(min=0)  # left and top, right and bottom
    low, high = sides.amin(dim=2), sides.amax(dim=2).clamp(min=1e-6)
    return (low / high).prod(dim=-1).sqrt()
