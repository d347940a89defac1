"""Channels compared as distributions over cells, by the functions that training uses."""

from __future__ import annotations

from torch import Tensor

from d2kd.losses import CWDLoss

from . import Arrays
from .features import feature_maps, student_leaves, with_gradients


def outputs(arrays: Arrays) -> dict[str, Tensor]:
    """What :class:`CWDLoss` makes of the inputs of ``cwd.npz``.

    Raises:
        InputError: an array is missing.
    """
    student, teacher = feature_maps(arrays)
    loss = CWDLoss(temperature=float(arrays["tau"]), weight=float(arrays["loss_weight"]))
    losses = {
        level: loss.weight * loss.divergence(s, teacher[level]).mean()
        for level, s in student.items()
    }
    return with_gradients({}, losses, student_leaves(student))
