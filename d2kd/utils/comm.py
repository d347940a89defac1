"""Reductions over processes, so that a loss does not depend on the number of processes."""

from __future__ import annotations

import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor


def reduce_mean(counts: Tensor, min_total: float = 1.0) -> Tensor:
    """Return the mean of ``counts`` over all processes, for use as the normalizer of a loss.

    DDP averages gradients over processes, so that a sum divided by this mean has the gradient of the whole batch
    in a single process. This is a collective operation: all processes must call it in the same order.

    Args:
        counts: a tensor of any shape, of equal shape in all processes.
        min_total: minimum of the sum over all processes.

    Returns:
        float32 of equal shape, without gradient.
    """
    counts = counts.detach().float()
    processes = comm.get_world_size()
    if processes > 1:
        counts = counts.clone()
        dist.all_reduce(counts)
    return counts.clamp(min=min_total) / processes


def any_rank(found: bool) -> bool:
    """Return whether ``found`` is true in any process. This is a collective operation."""
    return any(comm.all_gather(found))
