"""Localization distillation: what the teacher's distributions of the edges know, at objects and around them."""

from __future__ import annotations

import torch
from detectron2.structures import Boxes
from torch import Tensor, nn

from ..modeling.anchors import check_distributions
from ..modeling.atss import atss_candidates, is_foreground
from ..utils.errors import InputError
from .base import Weight
from .dense import DenseLoss
from .functional import softmax_kl

REGIONS = ("diou", "published")
WEIGHTINGS = ("iou", "mask")
NORMALIZE_BY = ("none", "positives")


class LDLoss(DenseLoss):
    """Distill the distributions of box edges of two GFLs, at foreground anchors and in a region around them.

    LD, "Localization Distillation for Dense Object Detection", CVPR 2022 (arXiv 2102.12252; TPAMI version 2204.05957),
    after the authors' code. With the logits z of the n + 1 distances of each edge e, p = softmax(z / tau):

        l(a, e)  tau^2 KL(p_T || p_S) / (n + 1)
        main     w_m sum over foreground anchors of v_a sum_e l(a, e) / 4,   v_a = max_k sigmoid(student's class logits), constant
        region   w_r sum over all anchors of r_a sum_e l(a, e) / 16
        class    w_c sum over levels of 1/P_l sum over its foreground anchors of tau_c^2 KL(q_T || q_S) / K,
                 q = softmax(class logits / tau_c), P_l = number of foreground anchors of the level

    The region of an object has all anchors with t/4 <= DIoU < t, t being the object's threshold in ATSS: anchors that
    are worse than its foreground. r_a is the highest IoU with an object in whose region a lies, else 0; with
    ``vlr_weighting="mask"``, as the paper has it, it is 1 in the region.

    The first two terms are sums: they grow with the images of a process (the authors warn of more than three) and
    with the number of foreground anchors. ``normalize_by="positives"``, not in the paper, divides both by the number
    of foreground anchors and needs higher weights.

    The authors' code takes for DIoU the intersection divided by the anchor's own area, less the distance of centers.
    So more than a third of its region lies outside of the one described: ``vlr="published"``. Its imitation of
    features is no part of this loss, see :class:`~d2kd.losses.ImitationLoss`.

    If the class lists differ (``class_map``), the softmax of the class term is over the shared classes, and objects of
    other classes have neither foreground anchors nor a region.

    Reads: ``student.pred_logits``, ``pred_distributions``, ``anchors``, ``gt_instances``, ``gt_labels``;
    ``teacher.pred_logits``, ``pred_distributions``.

    Args:
        main_weight, vlr_weight, class_weight: w_m, w_r, w_c.
        temperature, class_temperature: tau, tau_c.
        vlr: "diou", or "published", the region of the authors' code.
        vlr_weighting: "iou" or "mask".
        normalize_by: divisor of the first two terms, "none" or "positives".
        weight: a number or a schedule.
        across_processes: see :class:`~d2kd.losses.DistillLoss`.

    Raises:
        InputError: if an option is unknown. In ``setup``: if the detectors are not two GFLs with the same ``reg_max``; see
            also :class:`~d2kd.losses.dense.DenseLoss`.

    Example:
        >>> from d2kd.testing import batch, distiller, forward_losses, tiny_gfl
        >>> model = distiller(LDLoss, tiny_gfl, same=True)  # the teacher is a copy
        >>> [value.item() for key, value in forward_losses(model, batch()).items() if key.startswith("distill/")]
        [0.0, 0.0, 0.0]
    """

    def __init__(
        self,
        *,
        main_weight: float = 0.25,
        vlr_weight: float = 0.25,
        class_weight: float = 10.0,
        temperature: float = 10.0,
        class_temperature: float = 2.0,
        vlr: str = "diou",
        vlr_weighting: str = "iou",
        normalize_by: str = "none",
        weight: Weight = 1.0,
        across_processes: bool = True,
    ):
        super().__init__(weight=weight, across_processes=across_processes)
        for culprit, choice, choices in (
            ("vlr", vlr, REGIONS),
            ("vlr_weighting", vlr_weighting, WEIGHTINGS),
            ("normalize_by", normalize_by, NORMALIZE_BY),
        ):
            if choice not in choices:
                raise InputError(culprit, choice, " or ".join(choices))
        self.main_weight, self.vlr_weight = main_weight, vlr_weight
        self.class_weight = class_weight
        self.temperature, self.class_temperature = temperature, class_temperature
        self.vlr, self.vlr_weighting, self.normalize_by = vlr, vlr_weighting, normalize_by

    def setup(self, student: nn.Module, teacher: nn.Module) -> None:
        check_distributions(student, teacher)
        super().setup(student, teacher)

    def forward(self, student, teacher) -> dict[str, Tensor]:
        return {name: term.sum() for name, term in self.anchor_terms(student, teacher).items()}

    def anchor_terms(self, student, teacher) -> dict[str, Tensor]:
        """Return the share of each anchor in the terms "main", "vlr" and "class": ``(N, R)`` each."""
        s, t = self.logits(student, teacher)
        positive = is_foreground(self.labels(student), s.shape[-1])
        levels = positive.split([len(level) for level in student.anchors], dim=1)
        *per_level, total = self.normalizer(*(level.sum() for level in levels), positive.sum())
        # At all anchors, because indices would wait for their number.
        edges = torch.cat(student.pred_distributions, dim=1)
        divergence = softmax_kl(
            edges, torch.cat(teacher.pred_distributions, dim=1), self.temperature
        )
        divergence = divergence.sum(dim=-1) / edges.shape[-1]
        # Of all the student's classes, as in its own loss.
        score = torch.cat(student.pred_logits, dim=1).detach().float().sigmoid().amax(dim=-1)
        kl = softmax_kl(s, t, self.class_temperature) / s.shape[-1]
        counts = torch.cat([n.expand_as(x) for n, x in zip(per_level, levels)], dim=1)
        divisor = total if self.normalize_by == "positives" else 1.0
        return {
            "main": self.main_weight * (score * divergence / 4).where(positive, 0) / divisor,
            "vlr": self.vlr_weight * self.region(student) * divergence / 16 / divisor,
            "class": self.class_weight * (kl / counts).where(positive, 0),
        }

    @torch.no_grad()
    def region(self, student) -> Tensor:
        """Return r_a of a student's anchors, ``(N, R)``."""
        anchors, detector = student.anchors, student.detector
        sizes = [len(level) for level in anchors]
        weights = student.pred_logits[0].new_zeros(
            len(student.gt_instances), sum(sizes), dtype=torch.float32
        )
        every = Boxes.cat(anchors).tensor
        inside = detector.rows_inside(anchors, student.gt_instances)
        for weight, gt, rows in zip(weights, student.gt_instances, inside, strict=True):
            row = torch.cat(rows).to(every.device, non_blocking=True)
            if not len(gt) or not len(row):
                continue
            levels = [Boxes(x) for x in every[row].split([len(level) for level in rows])]
            found = localization_region(levels, gt.gt_boxes, detector.topk_anchors, self.vlr)
            if self.class_map is not None:
                found = found * (self.class_map.map_labels(gt.gt_classes) >= 0)
            if self.vlr_weighting == "mask":
                found = found.sign()
            weight.index_copy_(0, row, found.amax(dim=1))
        return weights


def localization_region(
    anchors: list[Boxes], gt_boxes: Boxes, topk: int = 9, vlr: str = "diou"
) -> Tensor:
    """Return the IoU ``(R, G)`` of anchors and objects, 0 for anchors outside of an object's region, see :class:`LDLoss`.

    Args:
        anchors: boxes of each level, R together.
        gt_boxes: G boxes, at least one.
        topk: number of ATSS's candidates for each object on each level.
        vlr: "diou" or "published".
    """
    candidates = atss_candidates(anchors, gt_boxes, topk)
    all_anchors = Boxes.cat(anchors)
    a, g = all_anchors.tensor[:, None], gt_boxes.tensor
    overlap = candidates.iou
    if vlr == "published":
        sides = (torch.min(a[..., 2:], g[..., 2:]) - torch.max(a[..., :2], g[..., :2])).clamp(min=0)
        overlap = sides.prod(dim=-1) / all_anchors.area()[:, None]
    enclosing = torch.max(a[..., 2:], g[..., 2:]) - torch.min(a[..., :2], g[..., :2])
    offset = (a[..., :2] + a[..., 2:] - g[..., :2] - g[..., 2:]) / 2
    distance = offset.square().sum(dim=-1) / enclosing.square().sum(dim=-1).clamp(min=1e-6)
    closeness = overlap - distance
    in_region = (closeness >= candidates.threshold / 4) & (closeness < candidates.threshold)
    return candidates.iou.where(in_region, 0)
