"""The student's levels reviewed from coarse to fine, by the functions that training uses."""

from __future__ import annotations

from torch import Tensor

from d2kd.losses import ReviewKDLoss
from d2kd.losses.reviewkd import hierarchical_distance

from . import Arrays
from .features import feature_maps, load, set_up, student_leaves, with_gradients

PARTS = {"reduce": "conv1", "expand": "conv2", "attention": "att_conv"}


def outputs(arrays: Arrays) -> dict[str, Tensor]:
    """What :class:`ReviewKDLoss` makes of the inputs of ``reviewkd.npz``.

    Raises:
        InputError: an array is missing.
    """
    student, teacher = feature_maps(arrays)
    finest = next(iter(student))
    loss = ReviewKDLoss(
        width=len(arrays[f"weight/{finest}/conv1.0.weight"]),
        weight=float(arrays["loss_weight"]),
        normalize=False,
    )
    set_up(loss, student, teacher, arrays)
    leaves = student_leaves(student)
    for level in student:
        for part, name in PARTS.items():
            module = getattr(loss.blocks[level], part)
            if module is not None:
                leaves |= load(module, arrays, level, name)
    reviewed = loss.review(student)
    losses = {
        level: loss.weight * hierarchical_distance(features, teacher[level])
        for level, features in reviewed.items()
    }
    found = {f"reviewed_feature/{level}": features for level, features in reviewed.items()}
    for level, block in loss.blocks.items():
        for key, buffer in block.named_buffers():
            part, _, rest = key.partition(".")
            if "running" in rest:
                found[f"after/{level}/{PARTS[part]}.{rest}"] = buffer
    return with_gradients(found, losses, leaves)
