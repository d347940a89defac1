"""CrossKD on reference arrays, for each family by the loss that training uses."""

from __future__ import annotations

import math
import re

import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import Boxes
from torch import Tensor, nn

from d2kd.losses import CrossKDLoss
from d2kd.modeling import GFL, DenseOutputs

from . import Arrays
from .dense import levels_of
from .gfl_erd import Pyramid, maps

TOWERS = {"cls_subnet": "classification", "bbox_subnet": "regression"}
PREDICTORS = {"cls_score": "classification", "bbox_pred": "regression"}


def conv_of(arrays: Arrays, name: str) -> nn.Conv2d:
    weight = arrays.tensor(f"{name}.weight")
    conv = nn.Conv2d(
        weight.shape[1], weight.shape[0], weight.shape[-1], padding=weight.shape[-1] // 2
    )
    conv.weight.data = weight
    conv.bias.data = (
        arrays.tensor(f"{name}.bias") if f"{name}.bias" in arrays else torch.zeros(len(weight))
    )
    return conv


def head_of(arrays: Arrays, kind: str) -> tuple[nn.Module, int]:
    """The rest of a teacher's head, with blocks of nothing before, and their number."""
    head, groups = nn.Module(), int(arrays[f"{kind}/num_groups"])
    for tower, name in TOWERS.items():
        prefix = f"{kind}/teacher_weight/{name}"
        found = (re.match(rf"{prefix}/(\d+)/conv", array) for array in arrays)
        blocks = sorted({int(match[1]) for match in found if match})
        joint = blocks[0] if blocks else 1
        layers: list[nn.Module] = [nn.Identity(), nn.ReLU()] * joint
        for block in blocks:
            layers.append(conv_of(arrays, f"{prefix}/{block}/conv"))
            if groups:
                norm = nn.GroupNorm(groups, layers[-1].out_channels)
                for part in ("weight", "bias"):
                    getattr(norm, part).data = arrays.tensor(f"{prefix}/{block}/gn.{part}")
                layers.append(norm)
            layers.append(nn.ReLU())
        setattr(head, tower, nn.Sequential(*layers))
    for layer, name in PREDICTORS.items():
        setattr(head, layer, conv_of(arrays, f"{kind}/teacher_weight/{name}/predictor"))
    if kind != "retinanet":
        head.scales = nn.Parameter(arrays.tensor(f"{kind}/teacher_weight/scales"))
    if kind == "gfl":
        head.reg_max = int(arrays["reg_max"])
    return head.requires_grad_(False), joint


def detector_of(arrays: Arrays, kind: str, levels: list[str], head: nn.Module) -> nn.Module:
    options = {
        "backbone": Pyramid(levels),
        "head": head,
        "head_in_features": levels,
        "num_classes": int(arrays["num_classes"]),
        "pixel_mean": [0.0] * 3,
        "pixel_std": [1.0] * 3,
    }
    if kind == "gfl":
        return GFL(**options)
    if kind == "fcos":
        return FCOS(**options)
    return RetinaNet(
        anchor_generator=DefaultAnchorGenerator(
            sizes=[[32.0]], aspect_ratios=[[1.0]], strides=[2 ** int(p[1:]) for p in levels]
        ),
        box2box_transform=Box2BoxTransform((1.0, 1.0, 1.0, 1.0), math.log(1000 / 16)),
        anchor_matcher=Matcher([0.4, 0.5], [0, -1, 1]),
        **options,
    )


def anchors_of(arrays: Arrays, kind: str, levels: list[str], cells: list[int]) -> list[Boxes]:
    """The anchors of each level; of FCOS, squares of a stride around its points; of GFL none, which need no boxes."""
    if kind == "gfl":
        return []
    if kind == "retinanet":
        per_cell = int(arrays["retinanet/anchors_of_a_cell"])
        return list(
            map(Boxes, arrays.tensor("retinanet/anchors_xyxy").split([n * per_cell for n in cells]))
        )
    points = arrays.tensor("fcos/points_xy").split(cells)
    halves = [2 ** int(level[1:]) / 2 for level in levels]
    return [Boxes(torch.cat([xy - half, xy + half], dim=1)) for xy, half in zip(points, halves)]


def outputs_of(arrays: Arrays, kind: str) -> dict[str, Tensor]:
    levels = levels_of(arrays, f"{kind}/student_classification_tower")
    head, joint = head_of(arrays, kind)
    loss = CrossKDLoss(
        joint=joint,
        class_weight=float(arrays[f"{kind}/classification_weight"]),
        box_weight=float(arrays[f"{kind}/regression_weight"]),
        temperature=float(arrays["gfl/temperature"]) if kind == "gfl" else 1.0,
    )
    detector = detector_of(arrays, kind, levels, head)
    loss.setup(detector, detector)
    given = {
        side: {
            t: list(maps(arrays, f"{kind}/{side}_{name}_tower", levels).values())
            for t, name in TOWERS.items()
        }
        for side in ("student", "teacher")
    }
    own = {name: [x.detach() for x in found] for name, found in given["teacher"].items()}
    teacher = DenseOutputs(
        detector,
        [],
        taps=dict(zip(loss.teacher_taps, own.values())),
        predictions=loss.predict(head, own),
    )
    student = DenseOutputs(detector, [], taps=dict(zip(loss.taps, given["student"].values())))
    cross = loss.cross_outputs(student, teacher)
    shapes = [x.shape for x in given["student"]["cls_subnet"]]
    anchors = anchors_of(arrays, kind, levels, [shape[2] * shape[3] for shape in shapes])
    used = torch.ones(shapes[0][0], sum(x.shape[1] for x in cross.pred_logits), dtype=torch.bool)
    if kind != "fcos":
        used = torch.cat([arrays.tensor(f"{kind}/is_used/{level}") for level in levels], dim=1)
    terms = loss.terms(
        cross, teacher, anchors, used, arrays.tensor(f"{kind}/normalizer"), skip_empty=False
    )
    total = sum(terms.values())
    total.backward()
    found = {"loss": total, "loss/classification": terms["class"], "loss/regression": terms["box"]}
    for k, level in enumerate(levels):
        found[f"cross_class_logits/{level}"] = cross.predictions[0][k]
        box = cross.predictions[1][k]
        found[f"cross_box_logits/{level}"] = (
            box if kind != "fcos" else box.relu() * 2 ** int(level[1:])
        )
        for tower, name in TOWERS.items():
            found[f"student_{name}_tower_grad/{level}"] = given["student"][tower][k].grad
    return {f"{kind}/{name}": value.detach() for name, value in found.items()}


def outputs(arrays: Arrays) -> dict[str, Tensor]:
    """What :class:`CrossKDLoss` makes of the inputs of all three families.

    Raises:
        InputError: an array is missing.
    """
    return {
        k: x for kind in ("gfl", "retinanet", "fcos") for k, x in outputs_of(arrays, kind).items()
    }
