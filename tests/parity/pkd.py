"""Feature maps compared by Pearson correlation, by the functions that training uses."""

from __future__ import annotations

from torch import Tensor

from d2kd.losses.pkd import correlation_distance, resize_as

from . import Arrays
from .features import feature_maps, student_leaves, with_gradients


def outputs(arrays: Arrays) -> dict[str, Tensor]:
    """What :class:`PKDLoss` makes of the inputs of ``pkd.npz``.

    Raises:
        InputError: an array is missing.
    """
    student, teacher = feature_maps(arrays)
    weight = float(arrays["loss_weight"])
    losses = {
        level: weight * correlation_distance(resize_as(s, teacher[level]), teacher[level])
        for level, s in student.items()
    }
    return with_gradients({}, losses, student_leaves(student))
