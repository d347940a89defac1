"""Pure functions of tensors that the losses share; computed in at least float32, inside autocast too."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def in_float32(function: Callable) -> Callable:
    """Run a function of tensors outside autocast, its half-precision arguments widened to float32.

    Sums over thousands of cells and logarithms of probabilities overflow or vanish in half precision.
    """

    @functools.wraps(function)
    def wide(*args, **kwargs):
        def widen(x):
            return x.float() if isinstance(x, Tensor) and x.dtype in _HALVES else x

        args = tuple(widen(x) for x in args)
        kwargs = {key: widen(x) for key, x in kwargs.items()}
        device = next((x.device.type for x in args if isinstance(x, Tensor)), "cpu")
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return wide


_HALVES = (torch.float16, torch.bfloat16)


@in_float32
def softmax_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """``tau^2 KL(softmax(t / tau) || softmax(s / tau))`` of each row (Hinton et al., 2015).

    Args:
        student_logits, teacher_logits: ``(R, K)``.

    Returns:
        ``(R,)``, never negative.
    """
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


@in_float32
def sigmoid_divergence(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """``tau^2 |p_T - p_S| BCE(p_S, p_T)`` of each entry, its first factor constant; and p_S, p_T, constant.

    Binary cross-entropy with soft targets, scaled as quality focal loss is (GFL, arXiv 2006.04388, with
    exponent 1): 0 with gradient 0 where both agree.

    Args:
        student_logits, teacher_logits: of equal shape, which is that of the results.
    """
    student_logits, teacher_logits = student_logits / temperature, teacher_logits / temperature
    ours, theirs = student_logits.detach().sigmoid(), teacher_logits.detach().sigmoid()
    entropy = F.binary_cross_entropy_with_logits(student_logits, theirs, reduction="none")
    return temperature**2 * (theirs - ours).abs() * entropy, ours, theirs


@in_float32
def masked_squared_error(
    student: Tensor, teacher: Tensor, mask: Tensor, normalizer: Tensor | None = None
) -> Tensor:
    """``sum_bij M_bij sum_c (S - T)^2 / (2 max(1, sum M))`` of one level.

    Args:
        student, teacher: ``(N, C, H, W)``.
        mask: ``(N, H, W)``, not negative.
        normalizer: in place of max(1, sum M).
    """
    cells = (student - teacher).square().sum(dim=1)
    return (cells * mask).sum() / (2 * at_least_one(mask.sum(), normalizer))


def at_least_one(count: Tensor, normalizer: Tensor | None) -> Tensor:
    """A given normalizer, or else ``max(1, count)``."""
    return count.clamp(min=1) if normalizer is None else normalizer
