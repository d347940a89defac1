"""What several processes have together: counts, so that a loss does not depend on how a batch is dealt."""

from __future__ import annotations

import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor


def over_processes(counts: Tensor, least: float = 1.0) -> Tensor:
    """What a process divides its sums by: the counts of all processes, by how many processes there are.

    DDP takes the mean of the processes' gradients, so a loss divided by this is the one of the whole batch in a
    single process. Collective: every process must call it, as often and in the same order.

    Args:
        counts: of this process, of any shape.
        least: what the count of all processes together is at least.

    Returns:
        float32 of equal shape, without gradient.
    """
    counts = counts.detach().float()
    processes = comm.get_world_size()
    if processes > 1:
        counts = counts.clone()
        dist.all_reduce(counts)
    return counts.clamp(min=least) / processes


def anywhere(found: bool) -> bool:
    """Whether something was found in any process. Collective."""
    return any(comm.all_gather(found))
