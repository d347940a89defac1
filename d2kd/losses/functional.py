"""Functions of tensors used by several losses, computed in at least float32 also under autocast.

Shape: N images, C channels, H and W of a level, R rows, K classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def in_float32(function: Callable) -> Callable:
    """Decorate a function to run outside autocast, with half-precision tensor arguments cast to float32.

    Sums over thousands of cells and logarithms of probabilities overflow or underflow in half precision.
    """

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        def to_float(x):
            return x.float() if isinstance(x, Tensor) and x.dtype in _HALVES else x

        args = tuple(to_float(x) for x in args)
        kwargs = {key: to_float(x) for key, x in kwargs.items()}
        device = next((x.device.type for x in args if isinstance(x, Tensor)), "cpu")
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return wrapper


_HALVES = (torch.float16, torch.bfloat16)


@in_float32
def softmax_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return ``tau^2 KL(softmax(t / tau) || softmax(s / tau))`` of each row (Hinton et al., 2015).

    Args:
        student_logits, teacher_logits: ``(R, K)``, or any shape whose last dimension is K.

    Returns:
        ``(R,)``, never negative.

    Example:
        >>> softmax_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor([0.3278])
    """
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


@in_float32
def sigmoid_divergence(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``tau^2 |p_T - p_S| BCE(p_S, p_T)`` of each entry, and the probabilities p_S and p_T.

    This is binary cross-entropy with soft targets, scaled as in quality focal loss (GFL, arXiv 2006.04388) with
    exponent 1. Value and gradient are 0 where p_S = p_T. The factor ``|p_T - p_S|``, p_S and p_T carry no gradient.

    Args:
        student_logits, teacher_logits: tensors of equal shape, which is also the shape of the outputs.

    Example:
        >>> sigmoid_divergence(torch.zeros(2), torch.tensor([0.0, 2.0]))[0]
        tensor([0.0000, 0.2639])
    """
    student_logits, teacher_logits = student_logits / temperature, teacher_logits / temperature
    p_s, p_t = student_logits.detach().sigmoid(), teacher_logits.detach().sigmoid()
    entropy = F.binary_cross_entropy_with_logits(student_logits, p_t, reduction="none")
    return temperature**2 * (p_t - p_s).abs() * entropy, p_s, p_t


@in_float32
def masked_squared_error(
    student: Tensor, teacher: Tensor, mask: Tensor, normalizer: Tensor | None = None
) -> Tensor:
    """Return ``sum_bij M_bij sum_c (S - T)^2 / (2 max(1, sum M))`` of one level.

    Args:
        student, teacher: ``(N, C, H, W)``.
        mask: ``(N, H, W)``, not negative.
        normalizer: replaces max(1, sum M).

    Example:
        >>> masked_squared_error(torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4), torch.ones(1, 4, 4))
        tensor(1.5000)
    """
    cells = (student - teacher).square().sum(dim=1)
    return (cells * mask).sum() / (2 * resolve_normalizer(mask.sum(), normalizer))


def resolve_normalizer(count: Tensor, normalizer: Tensor | None) -> Tensor:
    """Return ``normalizer`` if given, otherwise ``max(1, count)``."""
    return count.clamp(min=1) if normalizer is None else normalizer
