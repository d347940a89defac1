"""The state of every random generator a step may draw from, as plain values and tensors.

Only what ``torch.load(weights_only=True)`` accepts, so that a checkpoint that holds it needs no trust.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def random_state() -> dict:
    """Python's, NumPy's and torch's generators, and that of the current CUDA device if it is in use."""
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
    """Go back to a :func:`random_state`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """Whatever is drawn inside leaves no trace.

    An evaluation draws too (a data loader seeds its workers); without this, how often a run is evaluated
    would change what it learns.
    """
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
