"""What the files of all losses between feature maps have in common."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

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


def load(module: nn.Module, arrays: Arrays, level: str, names: dict[str, str]) -> None:
    """Give a module its weights in the file, whose names begin with these for those of its submodules."""
    state = {}
    for key, value in module.state_dict().items():
        name = next((name for prefix, name in names.items() if key.startswith(prefix)), None)
        if name is not None and not key.endswith("num_batches_tracked"):
            prefix = next(prefix for prefix in names if key.startswith(prefix))
            state[key] = arrays.tensor(f"weight/{level}/{name}{key.removeprefix(prefix)}")
            state[key] = state[key].reshape(value.shape)
        else:
            state[key] = value
    module.load_state_dict(state)


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
