"""The two focal losses of GFL (arXiv 2006.04388)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def quality_focal_loss(logits: Tensor, quality: Tensor, beta: float = 2.0) -> Tensor:
    """Return ``|q - p|^beta BCE(p, q)`` of each entry, with p = sigmoid(logits); gradients flow through both factors.

    Args:
        logits: any shape, which is also the output shape.
        quality: q in [0, 1], of equal shape: the IoU at the label of a foreground anchor, 0 elsewhere.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, quality, reduction="none")
    return (quality - logits.sigmoid()).abs().pow(beta) * entropy


def distribution_focal_loss(logits: Tensor, distances: Tensor) -> Tensor:
    """Return the cross-entropy with the two bins next to each target, weighted linearly by their proximity.

    Args:
        logits: ``(..., n + 1)``, before the softmax over bins.
        distances: ``(...)``, in units of bins; clamped to [0, n - 0.1].
    """
    target = distances.clamp(0, logits.shape[-1] - 1 - 0.1)
    below = target.floor()
    fraction = (target - below)[..., None]
    below = below.long()[..., None]
    log_p = F.log_softmax(logits, dim=-1)
    log_p = (1 - fraction) * log_p.gather(-1, below) + fraction * log_p.gather(-1, below + 1)
    return -log_p[..., 0]
