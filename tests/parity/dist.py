"""DIST's correlations of class probabilities, of regions and of dense detectors."""

from __future__ import annotations

import torch
from torch import Tensor

from d2kd.losses.dist import DISTLoss

from . import Arrays


def outputs(arrays: Arrays) -> dict[str, Tensor]:
    """What :class:`DISTLoss` makes of the inputs of ``dist.npz``, in the authors' form.

    Raises:
        InputError: an array is missing.
    """
    loss = DISTLoss(
        inter_weight=float(arrays["beta"]),
        intra_weight=float(arrays["gamma"]),
        floor=0,
        weight=float(arrays["loss_weight"]),
    )

    def weighted(table: tuple[Tensor, Tensor]) -> Tensor:
        inter, intra = loss.table_terms(*table)
        return loss.weight * (loss.inter_weight * inter + loss.intra_weight * intra)

    logits = arrays.tensor("regions/student_logits").requires_grad_()
    value = weighted(loss.region_table(logits, arrays.tensor("regions/teacher_logits")))
    found = {"regions/loss": value}
    (found["regions/student_logits_grad"],) = torch.autograd.grad(value, logits)

    prefix = "dense/student_logits/"
    levels = [name.removeprefix(prefix) for name in arrays if name.startswith(prefix)]
    maps = [arrays.tensor(prefix + level).requires_grad_() for level in levels]
    values = []
    for level, student in zip(levels, maps):
        teacher = arrays.tensor(f"dense/teacher_logits/{level}")
        # A map's channels are anchor times class; as one anchor of A * K classes, its cells are the rows.
        rows = [x.flatten(2).transpose(1, 2) for x in (student, teacher)]
        values.append(weighted(loss.dense_table(*rows, 1)))
    found |= {f"dense/loss/{level}": value for level, value in zip(levels, values)}
    found["dense/loss"] = sum(values)
    gradients = torch.autograd.grad(found["dense/loss"], maps)
    return found | {f"dense/student_logits_grad/{level}": x for level, x in zip(levels, gradients)}
