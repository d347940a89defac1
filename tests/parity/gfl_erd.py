"""The GFL detector and Elastic Response Distillation on reference arrays, by the functions that training and inference use."""

from __future__ import annotations

import re

import numpy as np
import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from d2kd.losses import ERDLoss
from d2kd.modeling import GFL, DenseOutputs

from . import Arrays


class Pyramid(nn.Module):
    """The shapes of feature maps that were computed elsewhere."""

    size_divisibility = 32

    def __init__(self, levels: list[str]):
        super().__init__()
        self.levels = levels

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {level: ShapeSpec(stride=2 ** int(level[1:])) for level in self.levels}


def detector(levels: list[str], num_classes: int, reg_max: int, num_old_classes: int = 0) -> GFL:
    """A GFL to which the answers of its head are given."""
    head = nn.Identity()
    head.reg_max = reg_max
    return GFL(
        backbone=Pyramid(levels),
        head=head,
        head_in_features=levels,
        num_classes=num_classes,
        num_old_classes=num_old_classes,
        pixel_mean=[0.0] * 3,
        pixel_std=[1.0] * 3,
    )


def levels_of(arrays: Arrays, prefix: str) -> list[str]:
    """The levels of which there is any array ``<prefix>/*/p*``, from fine to coarse."""
    found = {match[1] for name in arrays if (match := re.fullmatch(rf"{prefix}/\w+/p(\d+)", name))}
    return [f"p{level}" for level in sorted(map(int, found))]


def maps(arrays: Arrays, prefix: str, levels: list[str]) -> dict[str, Tensor]:
    """The arrays ``<prefix>/<level>`` as leaves, by level."""
    return {p: arrays.tensor(f"{prefix}/{p}").requires_grad_() for p in levels}


def truth(arrays: Arrays, image: int) -> Instances:
    """An image's new objects, in an image as large as the padded batch: so were the references made."""
    instances = Instances(tuple(arrays["padded_hw"].tolist()))
    instances.gt_boxes = Boxes(arrays.tensor(f"image{image}/gt_boxes_xyxy"))
    instances.gt_classes = arrays.tensor(f"image{image}/gt_new_classes").long()
    return instances


def unread(images: int) -> list[str]:
    """What a whole file has of its batch besides, for one of the two methods."""
    return ["num_old_classes", *(f"image{i}/size_hw" for i in range(images))]


def losses_of_levels(prefix: str, losses: dict[str, Tensor], anchors: list[Boxes]) -> dict:
    """The detection losses, summed over images and over the anchors of each level."""
    found = {}
    for name, ours in (("cls", "loss_cls"), ("bbox", "loss_box_reg"), ("dfl", "loss_dfl")):
        shares = losses[ours].detach().sum(dim=0).split([len(level) for level in anchors])
        found[f"{prefix}/loss_{name}"] = torch.stack([share.sum() for share in shares])
    return found


def outputs(arrays: Arrays) -> dict[str, np.ndarray]:
    """Every output ``gfl/*`` by name, from the inputs among the arrays.

    Raises:
        InputError: an input is missing.
    """
    levels = levels_of(arrays, "gfl") or ["p3"]  # none at all: p3 is missing first
    logits = maps(arrays, "gfl/class_logits", levels)
    edges = maps(arrays, "gfl/box_logits", levels)
    first = edges[levels[0]]
    for name in unread(len(first)):
        arrays[name]
    gfl = detector(levels, int(arrays["num_new_classes"]), first.shape[1] // 4 - 1)
    predictions = [list(logits.values()), list(edges.values())]

    anchors = gfl.anchor_generator(predictions[0])
    labels, boxes = gfl.label_anchors(anchors, [truth(arrays, i) for i in range(len(first))])
    by_anchor = gfl._transpose_predictions(predictions)
    losses = gfl.anchor_losses(anchors, by_anchor[0], labels, by_anchor[1], boxes)
    sum(loss.sum() for loss in losses.values()).backward()

    label = torch.stack(labels)
    of = {"gfl/anchors_xyxy": Boxes.cat(anchors).tensor}
    of["gfl/label_weights"] = (label >= 0).float()
    of["gfl/atss_labels"] = torch.where(label >= 0, label, gfl.num_classes)
    of |= losses_of_levels("gfl", losses, anchors)
    for level in levels:
        of[f"gfl/class_logits_grad/{level}"] = logits[level].grad
        of[f"gfl/box_logits_grad/{level}"] = edges[level].grad
    sizes = [tuple(arrays[f"image{i}/size_hw"].tolist()) for i in range(len(first))]
    images = ImageList(torch.empty(0), sizes)
    with torch.no_grad():
        for i, found in enumerate(gfl.forward_inference(images, predictions[0], predictions)):
            of[f"gfl/pred{i}/boxes_xyxy"] = found.pred_boxes.tensor
            of[f"gfl/pred{i}/scores"] = found.scores
            of[f"gfl/pred{i}/classes"] = found.pred_classes
    return {name: value.numpy() for name, value in of.items()}


def erd_outputs(arrays: Arrays) -> dict[str, np.ndarray]:
    """Every output ``erd/*`` by name, from the inputs among the arrays.

    Raises:
        InputError: an input is missing.
    """
    levels = levels_of(arrays, "erd") or ["p3"]
    old, new = int(arrays["num_old_classes"]), int(arrays["num_new_classes"])
    names = ("old_class_logits", "old_box_logits", "new_class_logits", "new_box_logits")
    given = {name: maps(arrays, f"erd/{name}", levels) for name in names}
    answers = [list(given[name].values()) for name in names]
    images, channels = answers[1][0].shape[:2]
    reg_max = channels // 4 - 1
    for name in unread(images):
        arrays[name]
    anchors = arrays.tensor("gfl/anchors_xyxy")
    anchors = list(map(Boxes, anchors.split([x.shape[-2] * x.shape[-1] for x in answers[1]])))

    gfl = detector(levels, old + new, reg_max, old)
    truths = [truth(arrays, i) for i in range(images)]
    for instances in truths:
        instances.gt_classes += old
    labels, boxes = gfl.label_anchors(anchors, truths)
    logits, edges = gfl._transpose_predictions(answers[2:])
    with torch.no_grad():
        losses = gfl.anchor_losses(anchors, logits, labels, edges, boxes)

    teacher = DenseOutputs(
        detector(levels, old, reg_max), [], predictions=answers[:2], anchors=anchors
    )
    student = DenseOutputs(gfl, [], predictions=answers[2:], anchors=anchors)
    erd = ERDLoss(class_pool="image", reference_images_per_process=None)
    erd.setup(gfl, teacher.detector)
    ours = erd.gather_predictions(student, "student")
    theirs = erd.gather_predictions(teacher, "teacher")
    selection = erd.select(teacher, theirs)
    squares, values = erd.class_terms(ours, theirs, selection)
    per_image = {
        "cls": squares / values.clamp(min=1),
        "bbox": erd.box_terms(ours, theirs, selection),
    }
    with EventStorage():
        sum(erd(student, teacher).values()).backward()

    of = losses_of_levels("erd", losses, anchors)
    for name, values in per_image.items():
        of[f"erd/loss_dist_{name}"] = values.detach()
    for i in range(images):
        for name, chosen in (
            ("selected_class", selection.classes),
            ("selected_box", selection.boxes),
            ("kept_box", selection.kept),
        ):
            of[f"erd/{name}_locations/image{i}"] = chosen[i].nonzero()[:, 0]
    for level in levels:
        of[f"erd/distill_grad_class_logits/{level}"] = given["new_class_logits"][level].grad
        of[f"erd/distill_grad_box_logits/{level}"] = given["new_box_logits"][level].grad
    return {name: value.numpy() for name, value in of.items()}
