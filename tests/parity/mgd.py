"""The teacher's maps generated from masked ones of the student, by the functions that training uses."""

from __future__ import annotations

from torch import Tensor

from d2kd.losses import MGDLoss

from . import Arrays
from .features import feature_maps, load, set_up, student_leaves, with_gradients


def outputs(arrays: Arrays) -> dict[str, Tensor]:
    """What :class:`MGDLoss` makes of the inputs of ``mgd.npz``.

    Raises:
        InputError: an array is missing.
    """
    student, teacher = feature_maps(arrays)
    loss = MGDLoss(
        mask_ratio=float(arrays["lambda_mgd"]),
        weight=float(arrays["alpha_mgd"]),
        reduction="sum",
        normalize=False,
    )
    set_up(loss, student, teacher, arrays)
    found, losses, leaves = {}, {}, student_leaves(student)
    for level, features in student.items():
        leaves |= load(loss.adapters.convs[level], arrays, level, "align")
        leaves |= load(loss.generators[level], arrays, level, "generation")
        keep = found[f"keep/{level}"] = loss.kept_cells(arrays.tensor(f"uniform/{level}"))
        adapted, target = loss.adapters(features, teacher[level], level)
        error = loss.error(level, adapted, target, keep)
        losses[level] = loss.weight * error / loss.num_images(adapted)
    return with_gradients(found, losses, leaves)
