"""An average of the student's weights over the training steps."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class EMA:
    """The exponential moving average of a detector's weights, and a detector that has them.

    After step n, average = decay · average + (1 − decay) · weights, with the decay min(decay, n / (n + 9)), so that an
    average of a short run forgets the initial weights, too. Running statistics are averaged, too; integers are copied.

    Args:
        detector: the student. Its weights before the first step do not matter.
        decay: of a step, in a long run.

    Attributes:
        detector: a copy of the student in eval mode with the average weights.
        steps: number of steps so far.
    """

    def __init__(self, detector: nn.Module, decay: float):
        self.detector = copy.deepcopy(detector).eval().requires_grad_(False)
        self.decay, self.steps = decay, 0

    @torch.no_grad()
    def update(self, detector: nn.Module) -> None:
        """Add the weights of another step."""
        decay = min(self.decay, self.steps / (self.steps + 9))
        self.steps += 1
        pairs = list(zip(_tensors(self.detector), _tensors(detector), strict=True))
        floating = [pair for pair in pairs if pair[0].is_floating_point()]
        for average, value in pairs:
            if not average.is_floating_point():
                average.copy_(value)
        if floating:
            averages, values = map(list, zip(*floating))
            torch._foreach_lerp_(averages, values, 1 - decay)

    def state_dict(self) -> dict:
        """The number of steps; the weights are a detector's own state."""
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict) -> None:
        self.steps = state_dict["steps"]


def _tensors(detector: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(detector.parameters(), detector.buffers())
