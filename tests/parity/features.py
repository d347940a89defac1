"""What the files of all losses between feature maps have in common."""

from __future__ import annotations

import re
from types import SimpleNamespace

import torch
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from d2kd.losses import FeatureLoss

from . import Arrays


def levels_of(arrays: Arrays) -> list[str]:
    """The levels of which there is any array, from fine to coarse."""
    found = {match[1] for name in arrays if (match := re.search(r"/p(\d+)(?:/|$)", name))}
    return [f"p{level}" for level in sorted(map(int, found))] or ["p3"]  # none: p3 is missing


def feature_maps(arrays: Arrays) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The student's maps by level, which are leaves, and the teacher's.

    Raises:
        InputError: one is missing, or a part of the batch's description, which nothing else reads.
    """
    levels = levels_of(arrays)
    student = {p: arrays.tensor(f"student_feature/{p}").requires_grad_() for p in levels}
    teacher = {p: arrays.tensor(f"teacher_feature/{p}") for p in levels}
    images = range(len(student[levels[0]]))
    for name in ("padded_hw", "strides", *(f"image{i}/size_hw" for i in images)):
        arrays[name]
    return student, teacher


def set_up(
    loss: FeatureLoss, student: dict[str, Tensor], teacher: dict[str, Tensor], arrays: Arrays
) -> None:
    """Create the modules of a loss for detectors that have such maps."""
    strides = dict(zip(student, arrays["strides"].tolist(), strict=True))
    detectors = []
    for maps in (student, teacher):
        shapes = {p: ShapeSpec(channels=x.shape[1], stride=strides[p]) for p, x in maps.items()}
        backbone = SimpleNamespace(output_shape=lambda shapes=shapes: shapes)
        detectors.append(SimpleNamespace(backbone=backbone))
    loss.setup(*detectors)


def load(module: nn.Module, arrays: Arrays, level: str, name: str) -> dict[str, nn.Parameter]:
    """Give a module of a level its parameters and buffers in the file, whose names there begin with `name`.

    Returns:
        dict: the parameters under the names of their gradients.
    """
    state = module.state_dict()
    for key in state:
        if not key.endswith("num_batches_tracked"):
            state[key] = arrays.tensor(f"weight/{level}/{name}.{key}")
    module.load_state_dict(state)
    return {f"weight_grad/{level}/{name}.{key}": p for key, p in module.named_parameters()}


def with_gradients(
    found: dict[str, Tensor], losses: dict[str, Tensor], leaves: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Add each level's loss, their sum, and its gradient by leaves under the names of these."""
    total = sum(losses.values())
    gradients = torch.autograd.grad(total, list(leaves.values()))
    found |= {f"loss/{level}": value for level, value in losses.items()}
    return found | {"loss": total} | dict(zip(leaves, gradients, strict=True))


def student_leaves(student: dict[str, Tensor]) -> dict[str, Tensor]:
    """The student's maps under the names of their gradients."""
    return {f"student_feature_grad/{level}": value for level, value in student.items()}
