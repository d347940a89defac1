"""The state of all random number generators that a training step may use.

It consists of tensors and Python's scalars, so that ``torch.load(weights_only=True)`` reads a checkpoint with it.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def random_state() -> dict:
    """Return the states of Python's, NumPy's and torch's generators, and of the current CUDA device's if in use."""
    name, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict) -> None:
    """Restore a :func:`random_state`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the random state at the end of the block.

    An evaluation uses random numbers, too, since a data loader seeds its workers. Without this, the evaluation
    period would change the training.
    """
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
