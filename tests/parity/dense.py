"""What the methods for dense detectors have in common: two GFLs with the arrays of a file as their predictions."""

from __future__ import annotations

import re

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from d2kd.losses.dense import DenseLoss
from d2kd.modeling import DenseOutputs

from . import Arrays
from .gfl_erd import detector, maps

PREDICTIONS = ("class_logits", "box_logits")


def levels_of(arrays: Arrays, prefix: str) -> list[str]:
    """The levels of which there is an array ``<prefix>/p*``, from fine to coarse; p3 if there is none at all."""
    found = {match[1] for name in arrays if (match := re.fullmatch(rf"{prefix}/p(\d+)", name))}
    return [f"p{level}" for level in sorted(map(int, found))] or ["p3"]


def anchors_of(arrays: Arrays, cells: list[int], name: str = "anchors_xyxy") -> list[Boxes]:
    return list(map(Boxes, arrays.tensor(name).split(cells)))


def truth(arrays: Arrays, image: int) -> Instances:
    """An image's objects, in an image as large as the padded batch: so were the references made."""
    arrays[f"image{image}/size_hw"]
    instances = Instances(tuple(arrays["padded_hw"].tolist()))
    instances.gt_boxes = Boxes(arrays.tensor(f"image{image}/gt_boxes_xyxy"))
    instances.gt_classes = arrays.tensor(f"image{image}/gt_classes").long()
    return instances


def gfl_pair(arrays: Arrays, loss: DenseLoss) -> tuple[DenseOutputs, DenseOutputs]:
    """The outputs of a student and its teacher, for which the loss has been set up."""
    levels = levels_of(arrays, "student_class_logits")
    if [2 ** int(level[1:]) for level in levels] != arrays["strides"].tolist():
        raise ValueError("other strides than those of the levels")
    predictions = [
        [list(maps(arrays, f"{side}_{name}", levels).values()) for name in PREDICTIONS]
        for side in ("student", "teacher")
    ]
    anchors = anchors_of(arrays, [x[0, 0].numel() for x in predictions[0][0]])
    truths = [truth(arrays, i) for i in range(len(predictions[0][0][0]))]
    outputs = [
        DenseOutputs(
            detector(levels, int(arrays["num_classes"]), int(arrays["reg_max"])),
            [],
            predictions=given,
            anchors=anchors,
            gt_instances=truths,
        )
        for given in predictions
    ]
    for map_ in (x for maps_ in predictions[1] for x in maps_):
        map_.requires_grad_(False)
    loss.setup(*(x.detector for x in outputs))
    return outputs[0], outputs[1]


def gfl_gradients(arrays: Arrays, student: DenseOutputs) -> dict[str, Tensor]:
    """The gradients of the student's predictions, by name."""
    levels = levels_of(arrays, "student_class_logits")
    return {
        f"student_{name}_grad/{level}": x.grad
        for name, given in zip(PREDICTIONS, student.predictions)
        for level, x in zip(levels, given, strict=True)
    }


def by_level(arrays: Arrays, name: str, terms: Tensor, anchors: list[Boxes]) -> dict[str, Tensor]:
    """Sums of each level of the terms of anchors, ``(N, R)``, by name."""
    shares = terms.detach().split([len(level) for level in anchors], dim=1)
    levels = levels_of(arrays, "student_class_logits")
    return {f"{name}/{level}": share.sum() for level, share in zip(levels, shares, strict=True)}


def atss_labels(student: DenseOutputs) -> Tensor:
    return torch.where(student.gt_labels >= 0, student.gt_labels, student.detector.num_classes)
