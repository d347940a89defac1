"""Time of the phases of a training step, from its ``torch.profiler.record_function`` ranges.

The profiler itself is not used, since it records every operator, which slows a step of a small detector by 25 %.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from unittest import mock

import torch
from torch.profiler import record_function

PHASES = ("student forward", "teacher", "losses", "backward", "optimizer", "rest")
"""``rest``: zeroing and clipping gradients, checking that losses are finite, writing metrics."""


def make_clock(device: torch.device) -> Callable[[], float]:
    """Return a function that returns the time in seconds after synchronizing the device."""
    if device.type != "cuda":
        return time.perf_counter

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def measure_phases(
    step: Callable[[], None], distilled: bool, now: Callable[[], float]
) -> dict[str, float]:
    """Measure the seconds of each of :data:`PHASES` in one step. Of nested ranges the innermost one counts.

    Args:
        step: runs a step of :class:`d2kd.engine.train_step.TrainStep`.
        distilled: whether the trained model is a Distiller.
        now: returned by :func:`make_clock`.
    """
    seconds, inside, since = dict.fromkeys(PHASES, 0.0), ["rest"], now()

    ranges = {
        "d2kd/student forward": "student forward",
        "d2kd/teacher.": "teacher",
        "d2kd/losses": "losses",
        "d2kd/backward": "backward",
        "Optimizer.step#": "optimizer",  # range of torch
    }
    if not distilled:
        ranges["d2kd/forward"] = "student forward"

    def phase(name: str) -> str | None:
        known = (found for start, found in ranges.items() if name.startswith(start))
        return next(known, None)

    def count() -> None:
        nonlocal since
        until = now()
        seconds[inside[-1]] += until - since
        since = until

    def begin(self: record_function) -> record_function:
        if name := phase(self.name):
            count()
            inside.append(name)
        return enter(self)

    def end(self: record_function, *error: object) -> None:
        leave(self, *error)
        if phase(self.name):
            count()
            inside.pop()

    enter, leave = record_function.__enter__, record_function.__exit__
    with mock.patch.multiple(record_function, __enter__=begin, __exit__=end):
        step()
    count()
    return seconds
