"""Where the time of a step goes, by the ranges that a step's code names for ``torch.profiler``.

The profiler itself is not used: it records every operator, which makes a step of a small detector a quarter slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from unittest import mock

import torch
from torch.profiler import record_function

PHASES = ("student forward", "teacher", "losses", "backward", "optimizer", "rest")
"""``rest`` is what a step does besides: zeroing, clipping, checking that all is finite, writing metrics."""


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds, after all that was asked of the device is done."""
    if device.type != "cuda":
        return time.perf_counter

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def phases(step: Callable[[], None], distilled: bool, now: Callable[[], float]) -> dict[str, float]:
    """Seconds of each of :data:`PHASES` in one step; ranges may lie inside each other, the innermost counts.

    Args:
        step: takes it, as :class:`d2kd.engine.step.Step` does.
        distilled: whether its forward is that of a Distiller, and not the student's.
        now: a :func:`clock`.
    """
    seconds, inside, since = dict.fromkeys(PHASES, 0.0), ["rest"], now()

    ranges = {
        "d2kd/student forward": "student forward",
        "d2kd/teacher.": "teacher",
        "d2kd/losses": "losses",
        "d2kd/backward": "backward",
        "Optimizer.step#": "optimizer",  # torch's own
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
