"""Elastic Response Distillation: an incremental detector keeps the strongest predictions of the old detector.

ERD, "Overcoming Catastrophic Forgetting in Incremental Object Detection via Elastic Response Distillation",
CVPR 2022 (arXiv 2204.02136). We had no access to the full paper. This follows the authors' code.

Notation: N images, R locations of all levels, K old classes, n + 1 bins per box edge.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.layers import batched_nms
from detectron2.structures import Boxes
from torch import Tensor, nn

from ..modeling.anchors import check_anchors, check_distributions
from ..modeling.box_regression import integral
from ..structures.class_map import num_classes_of
from ..utils.errors import InputError
from ..utils.metrics import put_metric
from .base import DistillLoss, Weight
from .functional import in_float32, softmax_kl

CLASS_POOLS = ("batch", "image")
BOX_WEIGHTS = ("student", "teacher")

SELECTED_CLASSES = "distill/erd_selected_classes"
"""Scalar: the fraction of locations selected for the classification term."""
SELECTED_BOXES = "distill/erd_selected_boxes"
"""Scalar: the fraction of locations selected for the box term, before non-maximum suppression."""
KEPT_BOXES = "distill/erd_kept_boxes"
"""Scalar: the mean number of boxes per image after non-maximum suppression, which the box term compares."""


@dataclass(frozen=True)
class Predictions:
    """Predictions of a detector at all locations.

    Attributes:
        logits: ``(N, R, K)`` float32, of the classes that both detectors have.
        distributions: ``(N, R, 4, n + 1)``, before the softmax.
    """

    logits: Tensor
    distributions: Tensor


@dataclass(frozen=True)
class Selection:
    """The selected locations, ``(N, R)`` bool each, but for the indices.

    Attributes:
        classes: locations whose class logits are compared.
        boxes: candidates of the box term, before non-maximum suppression.
        kept: locations whose distributions are compared, after non-maximum suppression.
        kept_indices: image and location of each of ``kept``, in this order, ``(J,)`` each.
    """

    classes: Tensor
    boxes: Tensor
    kept: Tensor
    kept_indices: tuple[Tensor, Tensor]


class ERDLoss(DistillLoss):
    """Distill old-class logits and box distributions at the locations with the teacher's strongest responses.

    For each image, over the locations a of all levels (padding included, as published), with the teacher's logits c
    and distributions z:

        S_c = {a: g_a > mean(g) + alpha_cls std(g)},   g_a = max_k sigmoid(c_ak)
        S_b = {a: h_a > mean(h) + alpha_box std(h)},   h_a = max over edges and bins of z_a
        J   = locations of S_b whose teacher boxes, scored by g, remain after class-wise non-maximum suppression

        classification  mean over S_c and k of (c^S_ak - c_ak)^2
        box             ld_weight sum over J of v_a sum over edges of tau^2 KL(p || p^S) / (4 (n + 1)),
                        p = softmax(z / tau),   v_a = max_k sigmoid(c^S_ak), constant

    The box term is a sum, so it grows with the number of selected locations. An empty selection gives 0.

    The published code sums the box terms of the two images of each process. ``reference_images_per_process`` is that
    two: sums are scaled to it, so the mean over processes (as DDP takes it) does not depend on how a batch is split.

    Settings of the two releases (all other defaults are the same in both):

    * first release (2022), two images per process: ``class_pool="batch", reference_images_per_process=2``. These are
      the defaults, except that here the mean over S_c is taken over the images of all processes.
    * second release (2023), and the reference arrays of the tests: ``class_pool="image", reference_images_per_process=None``, the
      plain sum over the images of a process.

    It is not known which of them gave the paper's results. For non-maximum suppression, both releases decode boxes
    without the level's stride, so boxes are at most 32 pixels long and hardly overlap on the coarse levels.
    ``decode_with_stride=True`` corrects this. It keeps fewer locations, so the box term is smaller.

    Reads: ``student.pred_logits``, ``student.pred_distributions``, ``teacher.pred_logits``,
    ``teacher.pred_distributions``, ``teacher.anchors``.

    Args:
        alpha_cls, alpha_box: threshold of the selection, in sample standard deviations above the mean.
        nms_thresh: IoU threshold of non-maximum suppression.
        decode_with_stride: whether boxes are decoded as in inference for non-maximum suppression.
        temperature: tau.
        ld_weight: weight of the box term.
        class_pool: "batch", the mean over the selected locations of all images; or "image", the sum of each image's
            mean, scaled as the box term is.
        reference_images_per_process: number of images to which sums over images are scaled. None: sums over the
            images of a process, which depend on the batch size.
        box_weight_from: the detector that gives v_a. With "student", box distillation fades where the student forgets.
        weight: a number or a schedule.
        across_processes: see :class:`~d2kd.losses.DistillLoss`.

    Raises:
        InputError: if an option is unknown. In ``setup``: if the detectors are not two GFLs with equal anchors, have no
            class in common, or the student has fewer classes than the teacher.

    Example:
        >>> from d2kd.testing import batch, sum_distill_losses, distiller, forward_losses, tiny_gfl
        >>> sum_distill_losses(forward_losses(distiller(ERDLoss, tiny_gfl), batch())).item() > 0
        True
        >>> sum_distill_losses(forward_losses(distiller(ERDLoss, tiny_gfl, same=True), batch())).item()  # the teacher is a copy
        0.0
    """

    needs_ground_truth = False

    def __init__(
        self,
        *,
        alpha_cls: float = 2.0,
        alpha_box: float = 2.0,
        nms_thresh: float = 0.005,
        decode_with_stride: bool = False,
        temperature: float = 10.0,
        ld_weight: float = 0.25,
        class_pool: str = "batch",
        reference_images_per_process: float | None = 2,
        box_weight_from: str = "student",
        weight: Weight = 1.0,
        across_processes: bool = True,
    ):
        super().__init__(weight=weight, across_processes=across_processes)
        for culprit, choice, choices in (
            ("class_pool", class_pool, CLASS_POOLS),
            ("box_weight_from", box_weight_from, BOX_WEIGHTS),
        ):
            if choice not in choices:
                raise InputError(culprit, choice, " or ".join(choices))
        self.alpha_cls, self.alpha_box = alpha_cls, alpha_box
        self.nms_thresh, self.decode_with_stride = nms_thresh, decode_with_stride
        self.temperature, self.ld_weight = temperature, ld_weight
        self.class_pool = class_pool
        self.reference_images_per_process = reference_images_per_process
        self.box_weight_from = box_weight_from

    def setup(self, student: nn.Module, teacher: nn.Module) -> None:
        check_distributions(student, teacher)
        check_anchors(student, teacher, self.scale)
        set_old_classes(self, student, teacher)

    def forward(self, student, teacher) -> dict[str, Tensor]:
        student_predictions = self.gather_predictions(student, "student")
        teacher_predictions = self.gather_predictions(teacher, "teacher")
        selection = self.select(teacher, teacher_predictions)
        squares, values = self.class_terms(student_predictions, teacher_predictions, selection)
        boxes = self.box_terms(student_predictions, teacher_predictions, selection)

        n = len(boxes)
        selected, images = self.normalizer(values.sum(), values.new_full((), n))
        scale = 1.0
        if self.reference_images_per_process is not None:
            scale = self.reference_images_per_process / images
        if self.class_pool == "batch":
            classification = squares.sum() / selected
        else:
            classification = (squares / values.clamp(min=1)).sum() * scale
        put_metric(SELECTED_CLASSES, selection.classes.double().mean())
        put_metric(SELECTED_BOXES, selection.boxes.double().mean())
        put_metric(KEPT_BOXES, selection.kept.sum().double() / n)
        return {"classification": classification, "box": boxes.sum() * scale}

    def gather_predictions(self, outputs, side: str) -> Predictions:
        """Concatenate the predictions of all levels of ``DenseOutputs``. ``side``: "student" or "teacher"."""
        return Predictions(
            select_old_classes(self, torch.cat(outputs.pred_logits, dim=1).float(), side),
            torch.cat(outputs.pred_distributions, dim=1),
        )

    @torch.no_grad()
    def select(self, teacher, predictions: Predictions) -> Selection:
        """Select locations from the ``predictions`` gathered from a teacher's ``DenseOutputs``."""
        scores, classes = predictions.logits.sigmoid().max(dim=-1)
        edges = predictions.distributions.float()
        boxes = elastic_selection(edges.flatten(2).amax(dim=-1), self.alpha_box)
        # The only two waits of this loss, besides those of non-maximum suppression: the indices, and each image's number.
        image, row = boxes.nonzero(as_tuple=True)
        anchors = Boxes.cat(teacher.anchors)[row]
        decoded = self._decode(integral(edges[image, row]), anchors, teacher.detector)
        kept, kept_rows = torch.zeros_like(boxes), []
        # Image by image: batched_nms separates groups by an offset, and offsets for images too would round the boxes.
        counts = boxes.sum(dim=1).tolist()
        for i, (rows, candidates) in enumerate(zip(row.split(counts), decoded.split(counts))):
            best = batched_nms(candidates, scores[i, rows], classes[i, rows], self.nms_thresh)
            kept_rows.append(rows[best].sort().values)
            kept[i].index_fill_(0, kept_rows[i], True)
        indices = torch.cat([torch.full_like(rows, i) for i, rows in enumerate(kept_rows)])
        indices = indices, torch.cat(kept_rows)
        return Selection(elastic_selection(scores, self.alpha_cls), boxes, kept, indices)

    def class_terms(
        self, student: Predictions, teacher: Predictions, selection: Selection
    ) -> tuple[Tensor, Tensor]:
        """Return each image's sum of squared differences and the number of summed values, ``(N,)`` each."""
        # At all locations, because indices would wait for their number.
        squares = (student.logits - teacher.logits).square().sum(dim=-1)
        values = selection.classes.sum(dim=1) * student.logits.shape[-1]
        return squares.where(selection.classes, 0).sum(dim=1), values

    def box_terms(self, student: Predictions, teacher: Predictions, selection: Selection) -> Tensor:
        """Return each image's sum over its kept locations, ``ld_weight`` included: ``(N,)``."""
        image, row = selection.kept_indices
        s, t = (x.distributions[image, row] for x in (student, teacher))
        score_source = student if self.box_weight_from == "student" else teacher
        weight = score_source.logits.detach()[image, row].sigmoid().amax(dim=-1)
        divergence = softmax_kl(s, t, self.temperature).mean(dim=-1) / s.shape[-1]
        terms = self.ld_weight * weight * divergence
        return terms.new_zeros(len(selection.kept)).index_add(0, image, terms)

    def _decode(self, deltas: Tensor, anchors: Boxes, detector: nn.Module) -> Tensor:
        if self.decode_with_stride:
            return detector.box2box_transform.apply_deltas(deltas, anchors.tensor)
        centers = anchors.get_centers()
        return torch.cat([centers - deltas[:, :2], centers + deltas[:, 2:]], dim=1)


@in_float32
def elastic_selection(responses: Tensor, alpha: float) -> Tensor:
    """Return a mask of the responses ``(N, R)`` above their row's mean plus ``alpha`` sample standard deviations.

    Example:
        >>> elastic_selection(torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0]]), 1.0)
        tensor([[False, False, False, False,  True]])
    """
    if responses.numel() <= len(responses):  # one response has no sample standard deviation
        return torch.zeros_like(responses, dtype=torch.bool)
    bound = responses.mean(dim=1) + alpha * responses.std(dim=1)
    return responses > bound[:, None]


def select_old_classes(loss: DistillLoss, logits: Tensor, side: str) -> Tensor:
    """Return the logits of the classes that both detectors have; without class names, the teacher's come first.

    Args:
        loss: a loss for which :func:`set_old_classes` was called.
        logits: ``(…, K)``.
        side: whose logits they are, "student" or "teacher".
    """
    if loss.class_map is None:
        return logits[..., : loss.num_old_classes]
    return loss.class_map.select(logits, side)


def set_old_classes(loss: DistillLoss, student: nn.Module, teacher: nn.Module) -> None:
    """Set ``num_classes`` and ``num_old_classes`` of a loss.

    Raises:
        InputError: if the student has fewer classes than the teacher, or no class of the same name.
    """
    loss.num_classes, loss.num_old_classes = num_classes_of(student), num_classes_of(teacher)
    if loss.class_map is None and loss.num_classes < loss.num_old_classes:
        found = f"student {loss.num_classes}, teacher {loss.num_old_classes}"
        raise InputError("num_classes", found, "the teacher's classes first, then new ones")
    if loss.class_map is not None and not loss.class_map.pairs:
        raise InputError(
            "classes", "none is the student's and the teacher's", "the old ones in both"
        )
