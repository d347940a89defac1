"""The two focal losses of GFL (arXiv 2006.04388)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def quality_focal_loss(logits: Tensor, quality: Tensor, beta: float = 2.0) -> Tensor:
    """``|q - p|^beta BCE(p, q)`` of each entry, p the logit's sigmoid; both factors have a gradient.

    Args:
        logits: any shape, which is that of the result.
        quality: q in [0, 1] of equal shape: IoU at the label of a foreground anchor, 0 elsewhere.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, quality, reduction="none")
    return (quality - logits.sigmoid()).abs().pow(beta) * entropy


def distribution_focal_loss(logits: Tensor, distances: Tensor) -> Tensor:
    """Cross-entropy with the two whole distances around each target, in proportion to their nearness.

    Args:
        logits: ``(…, n + 1)``.
        distances: ``(…)`` in the unit of the bins, clamped to [0, n - 0.1].
    """
    target = distances.clamp(0, logits.shape[-1] - 1 - 0.1)
    below = target.floor()
    share = (target - below)[..., None]
    below = below.long()[..., None]
    log_p = F.log_softmax(logits, dim=-1)
    return -((1 - share) * log_p.gather(-1, below) + share * log_p.gather(-1, below + 1))[..., 0]
