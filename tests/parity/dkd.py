"""Decoupled knowledge distillation of the classes of regions."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from d2kd.losses.dkd import DKDLoss

from . import Arrays


def outputs(arrays: Arrays) -> dict[str, Tensor]:
    """What :class:`DKDLoss` makes of the inputs of ``dkd.npz``.

    Raises:
        InputError: an array is missing.
    """
    loss = DKDLoss(
        target_weight=float(arrays["alpha"]),
        non_target_weight=float(arrays["beta"]),
        temperature=float(arrays["temperature"]),
    )
    logits = arrays.tensor("student_logits").requires_grad_()
    student = SimpleNamespace(pred_class_logits=logits, gt_classes=arrays.tensor("gt_classes"))
    teacher = SimpleNamespace(pred_class_logits=arrays.tensor("teacher_logits"))
    target, non_target = loss.stage_terms(student, teacher)
    total = loss.target_weight * target + loss.non_target_weight * non_target
    (gradient,) = torch.autograd.grad(total, logits)
    return {
        "loss/target": target,
        "loss/non_target": non_target,
        "loss": total,
        "student_logits_grad": gradient,
    }
