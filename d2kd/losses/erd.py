"""Elastic Response Distillation: an incremental detector keeps saying what the old one said most clearly.

ERD, "Overcoming Catastrophic Forgetting in Incremental Object Detection via Elastic Response Distillation",
CVPR 2022 (arXiv 2204.02136). The paper's body could not be read; this follows the authors' code.

Letters: N images, R locations of all levels together, K the old classes, n + 1 the bins of an edge.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.layers import batched_nms
from detectron2.structures import Boxes
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..modeling.box_regression import integral
from ..structures.class_map import num_classes_of
from ..utils.errors import InputError
from .base import DistillLoss, Weight, check_anchors
from .functional import in_float32, softmax_kl

CLASS_POOLS = ("batch", "image")
BOX_WEIGHTS = ("student", "teacher")


CLASSES = "distill/erd_selected_classes"
"""Scalar: the share of locations that are compared in their classes; two deviations above the mean are few."""
LOCATIONS = "distill/erd_selected_boxes"
"""Scalar: the share of locations whose boxes stand out."""
KEPT = "distill/erd_kept_boxes"
"""Scalar: how many of an image's are left by non-maximum suppression, and so are compared."""


@dataclass(frozen=True)
class Answer:
    """What a detector says of all locations.

    Attributes:
        logits: ``(N, R, K)`` float32, of the classes both know.
        distributions: ``(N, R, 4, n + 1)``, before the softmax.
    """

    logits: Tensor
    distributions: Tensor


@dataclass(frozen=True)
class Selection:
    """The locations that are compared, ``(N, R)`` bool each.

    Attributes:
        classes: where class logits are.
        boxes: where distributions would be, before non-maximum suppression.
        kept: where they are.
    """

    classes: Tensor
    boxes: Tensor
    kept: Tensor


class ERDLoss(DistillLoss):
    """The old classes' logits and the boxes' distributions, where the old detector's answer stands out.

    Of each image's locations a, all levels together and those in the batch's padding too, as published, with the
    teacher's logits c and distributions z:

        S_c = {a: g_a > mean(g) + alpha_cls std(g)},   g_a = max_k sigmoid(c_ak)
        S_b = {a: h_a > mean(h) + alpha_box std(h)},   h_a = max over edges and bins of z_a
        J   = what class-wise non-maximum suppression leaves of the teacher's boxes at S_b, scored by g

        classification  mean over S_c and k of (c^S_ak - c_ak)^2
        box             ld_weight sum over J of v_a sum over edges of tau^2 KL(p || p^S) / (4 (n + 1)),
                        p = softmax(z / tau),   v_a = max_k sigmoid(c^S_ak), constant

    The box term is a sum: the more stands out, the more it weighs. An empty selection gives 0.

    The mean over processes, as DDP takes it, does not depend on how a batch is dealt to them. The published code
    instead has two images in a process and adds up its box terms; ``reference_images_per_process`` is that two.

    What the settings say, all other defaults being those of both releases:

    * the reference arrays, and the second release (2023): ``class_pool="image",
      reference_images_per_process=None``, the plain sum over a process's images;
    * the first release (2022), with its two images in a process: ``class_pool="batch",
      reference_images_per_process=2``. These are the defaults, but that the mean over S_c is taken over the
      images of all processes.

    Which of them gave the paper's figures is not known. Both releases decode the boxes for non-maximum
    suppression without the level's stride, so that they are at most 32 pixels long and hardly overlap on the
    coarse levels; ``decode_with_stride=True`` corrects it, keeps fewer locations, and so weighs boxes less.

    Reads: ``student.pred_logits``, ``student.pred_distributions``, ``teacher.pred_logits``,
    ``teacher.pred_distributions``, ``teacher.anchors``.

    Args:
        alpha_cls, alpha_box: standard deviations (of a sample) above the mean.
        nms_thresh: IoU above which the lower score goes.
        decode_with_stride: whether boxes are decoded as in inference for non-maximum suppression.
        temperature: tau.
        ld_weight: of the box term.
        class_pool: "batch", the mean over all images' selected rows; "image", the sum of each image's mean,
            taken as the box term's sum is.
        reference_images_per_process: sums over the images are made what they would be over that many; None:
            they stay sums over the images of a process, and depend on how many it has.
        box_weight_from: who says v_a. "student": the distillation of boxes fades where it forgets.
        weight: a number or a schedule.
        across_processes: see :class:`~d2kd.losses.DistillLoss`.

    Raises:
        InputError: an unknown choice; on ``bind``, detectors that are no pair of GFLs with equal anchors,
            that have no class in common, or whose old classes are not the teacher's.
    """

    term_weights = {"box": "ld_weight"}

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

    def bind(self, student: nn.Module, teacher: nn.Module) -> None:
        bins = [getattr(getattr(d, "head", None), "reg_max", None) for d in (student, teacher)]
        if None in bins or bins[0] != bins[1]:
            names = [type(d).__name__ for d in (student, teacher)]
            found = f"student {names[0]} with reg_max {bins[0]}, teacher {names[1]} with {bins[1]}"
            raise InputError("distributions", found, "two GFLs with the same reg_max")
        check_anchors(student, teacher, self.scale)
        check_old_classes(self, student, teacher)

    def forward(self, student, teacher) -> dict[str, Tensor]:
        ours, theirs = self.answer(student, "of_student"), self.answer(teacher, "of_teacher")
        selection = self.select(teacher, theirs)
        squares, values = self.class_terms(ours, theirs, selection)
        boxes = self.box_terms(ours, theirs, selection)

        n = len(boxes)
        selected, images = self.normalizer(values.sum(), values.new_full((), n))
        scale = 1.0
        if self.reference_images_per_process is not None:
            scale = self.reference_images_per_process / images
        if self.class_pool == "batch":
            classification = squares.sum() / selected
        else:
            classification = (squares / values.clamp(min=1)).sum() * scale
        counts = torch.stack([selection.classes, selection.boxes, selection.kept]).sum(dim=(1, 2))
        classes, locations, kept = counts.tolist()
        scalars = {CLASSES: classes / selection.classes.numel()}
        scalars |= {LOCATIONS: locations / selection.boxes.numel(), KEPT: kept / n}
        get_event_storage().put_scalars(**scalars)
        return {"classification": classification, "box": boxes.sum() * scale}

    def answer(self, said, side: str) -> Answer:
        """What one side's ``DenseOutputs`` say, put together once; "of_student" or "of_teacher"."""
        return Answer(
            torch.cat(said.pred_logits, dim=1).float()[..., old_classes(self, side)],
            torch.cat(said.pred_distributions, dim=1),
        )

    @torch.no_grad()
    def select(self, teacher, answer: Answer) -> Selection:
        """Where the answer of a teacher, of whose ``DenseOutputs`` it is, stands out."""
        scores, classes = answer.logits.sigmoid().max(dim=-1)
        edges = answer.distributions.float()
        boxes = elastic_selection(edges.flatten(2).amax(dim=-1), self.alpha_box)
        image, row = boxes.nonzero(as_tuple=True)
        anchors = Boxes.cat(teacher.anchors)[row]
        decoded = self._decode(integral(edges[image, row]), anchors, teacher.detector)
        kept = torch.zeros_like(boxes)
        # Image by image: moved apart by image as well as by class, boxes would be rounded otherwise.
        counts = boxes.sum(dim=1).tolist()
        for i, (rows, candidates) in enumerate(zip(row.split(counts), decoded.split(counts))):
            best = batched_nms(candidates, scores[i, rows], classes[i, rows], self.nms_thresh)
            kept[i, rows[best]] = True
        return Selection(elastic_selection(scores, self.alpha_cls), boxes, kept)

    def class_terms(
        self, student: Answer, teacher: Answer, selection: Selection
    ) -> tuple[Tensor, Tensor]:
        """For each image the sum of squares at its selected locations, and of how many values: ``(N,)`` each."""
        image, row = selection.classes.nonzero(as_tuple=True)
        squares = (student.logits[image, row] - teacher.logits[image, row]).square().sum(dim=-1)
        values = selection.classes.sum(dim=1) * student.logits.shape[-1]
        return squares.new_zeros(len(values)).index_add(0, image, squares), values

    def box_terms(self, student: Answer, teacher: Answer, selection: Selection) -> Tensor:
        """For each image the sum over its kept locations, ``ld_weight`` included: ``(N,)``."""
        image, row = selection.kept.nonzero(as_tuple=True)
        ours, theirs = (x.distributions[image, row] for x in (student, teacher))
        judge = student if self.box_weight_from == "student" else teacher
        weight = judge.logits.detach()[image, row].sigmoid().amax(dim=-1)
        divergence = softmax_kl(ours, theirs, self.temperature).mean(dim=-1) / ours.shape[-1]
        terms = self.ld_weight * weight * divergence
        return terms.new_zeros(len(selection.kept)).index_add(0, image, terms)

    def _decode(self, deltas: Tensor, anchors: Boxes, detector: nn.Module) -> Tensor:
        if self.decode_with_stride:
            return detector.box2box_transform.apply_deltas(deltas, anchors.tensor)
        centers = anchors.get_centers()
        return torch.cat([centers - deltas[:, :2], centers + deltas[:, 2:]], dim=1)


@in_float32
def elastic_selection(responses: Tensor, alpha: float) -> Tensor:
    """Which responses of each row exceed its mean by more than ``alpha`` standard deviations, those of a sample.

    Args:
        responses: ``(N, R)``.
    """
    if responses.numel() <= len(responses):  # a sample of one has no deviation, nor what to exceed
        return torch.zeros_like(responses, dtype=torch.bool)
    bound = responses.mean(dim=1) + alpha * responses.std(dim=1)
    return responses > bound[:, None]


def old_classes(loss: DistillLoss, side: str) -> slice | list[int]:
    """The classes both detectors know, as one side numbers them: without names the teacher's, which come first.

    Args:
        loss: that was bound by :func:`check_old_classes`.
        side: "of_student" or "of_teacher".
    """
    if loss.class_map is None:
        return slice(loss.num_old_classes)
    return getattr(loss.class_map, side)


def check_old_classes(loss: DistillLoss, student: nn.Module, teacher: nn.Module) -> None:
    """Tell a loss how many classes there are, and were before.

    Raises:
        InputError: the student has fewer, or shares none by name.
    """
    loss.num_classes, loss.num_old_classes = num_classes_of(student), num_classes_of(teacher)
    if loss.class_map is None and loss.num_classes < loss.num_old_classes:
        found = f"student {loss.num_classes}, teacher {loss.num_old_classes}"
        raise InputError("num_classes", found, "the teacher's classes first, then new ones")
    if loss.class_map is not None and not loss.class_map.pairs:
        raise InputError(
            "classes", "none is the student's and the teacher's", "the old ones in both"
        )
