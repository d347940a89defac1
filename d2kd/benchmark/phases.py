"""Where the time of a step goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import nn

from ..modeling import Distiller

PHASES = ("student forward", "teacher", "losses", "backward", "optimizer", "rest")
"""``rest`` is what a step does besides: zeroing, clipping, checking that all is finite, writing metrics."""


class Stopwatch:
    """Seconds by name, of phases that may lie inside each other; each instant counts for the innermost.

    Args:
        now: a clock in seconds, that of a GPU waiting for its work to be done.
    """

    def __init__(self, now: Callable[[], float]):
        self.seconds: dict[str, float] = {}
        self._now = now
        self._running: list[str] = []
        self._since = 0.0

    def _count(self) -> None:
        now = self._now()
        if self._running:
            name = self._running[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._count()
        self._running.append(name)
        try:
            yield
        finally:
            self._count()
            self._running.pop()


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds, after all that was asked of the device is done."""
    if device.type != "cuda":
        return time.perf_counter

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def phases(
    step: Callable[[], None],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> dict[str, float]:
    """Seconds of each of :data:`PHASES` in one step, slower than an unwatched one by what watching costs.

    Args:
        step: takes it.
        model: what it trains, a plain detector or a :class:`Distiller`.
        optimizer: what it moves it with.
        device: where.
    """
    watch = Stopwatch(clock(device))

    def watched(function: Callable, name: str) -> Callable:
        def call(*args, **kwargs):
            with watch.phase(name):
                return function(*args, **kwargs)

        return call

    def asked(*args, **kwargs):
        outputs = ask(*args, **kwargs)
        precision = outputs.precision

        @contextlib.contextmanager
        def answering() -> Iterator[None]:
            with watch.phase("teacher"), precision():
                yield

        outputs.precision = answering
        return outputs

    student = model.student if isinstance(model, Distiller) else model
    with contextlib.ExitStack() as during:

        def watch_method(owner: object, method: str, name: str) -> None:
            function = watched(getattr(owner, method), name)
            during.enter_context(mock.patch.object(owner, method, function))

        watch_method(student, "forward", "student forward")
        if isinstance(model, Distiller):
            watch_method(model.losses, "forward", "losses")
            ask = model.teacher.ask
            during.enter_context(mock.patch.object(model.teacher, "ask", asked))
        backward = torch.Tensor.backward
        during.enter_context(
            mock.patch.object(torch.Tensor, "backward", watched(backward, "backward"))
        )
        watch_method(optimizer, "step", "optimizer")
        with watch.phase("rest"):
            step()
    return {name: watch.seconds.get(name, 0.0) for name in PHASES}
