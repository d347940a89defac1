"""Training that is interrupted by a signal ends after a step, with a checkpoint."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Ctrl-C, and what schedulers such as Slurm, and torchrun, send to a job before they kill it."""

EXIT_CODES = tuple(128 + number for number in SIGNALS)
"""Exit codes of a process that a signal has stopped, as shells have them: 130 and 143."""

REPEATED_WITHIN = 2.0  # seconds: a terminal and torchrun both pass on the same Ctrl-C


class StopSignals:
    """Records SIGINT and SIGTERM inside :meth:`recorded`. A second one, 2 seconds later or more, ends the process.

    Attributes:
        received: number of the first signal; 0: none.
    """

    def __init__(self) -> None:
        self.received, self._time = 0, 0.0

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Record signals in the block. Only the main thread can; in another one nothing is recorded."""
        with _handlers(self._record):
            yield

    def _record(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._time = number, now
        elif now - self._time >= REPEATED_WITHIN:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextlib.contextmanager
def signals_to_children() -> Iterator[None]:
    """Pass SIGINT and SIGTERM on to the processes of ``multiprocessing`` in the block, for which this one waits."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        for child in multiprocessing.active_children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, number)

    with _handlers(pass_on):
        yield


@contextlib.contextmanager
def _handlers(handler: signal.Handlers) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
