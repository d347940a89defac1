"""A study's screen: one line per run, everything else in the run's log."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Iterator
from typing import TextIO

from ..engine.run_info import LOGGERS


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what Detectron2, pycocotools and we say off the screen; a run's log has it."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [logging.NullHandler()], False
        logger.setLevel(logging.INFO)  # also tells DefaultTrainer that logging is set up
    try:
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            yield
    finally:
        for logger, (handlers, level, propagate) in zip(loggers, before):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)


class Progress:
    """A line on the screen: step i/n, elapsed, left. Into a pipe, a new line every half minute.

    Args:
        label: what is under way.
        console: where.
        last: what follows the last step.
        live: False where other lines are written meanwhile; then it is as into a pipe.
    """

    def __init__(self, label: str, console: TextIO, last: str = "now testing", live: bool = True):
        self.label, self.console, self.live = label, console, live and console.isatty()
        self.last = last
        self.start: tuple[float, int] | None = None
        self.shown = 0.0
        if self.live:
            self._say("starting", "")

    def __call__(self, step: int, steps: int) -> None:
        now = time.monotonic()
        if self.start is None:
            self.start, self.shown = (now, step), -math.inf
        if step < steps and now - self.shown < (0.2 if self.live else 30):
            return
        self.shown = now
        elapsed, done = now - self.start[0], step - self.start[1]
        rest = f"{_clock(elapsed / done * (steps - step))} left" if done else ""
        rest = self.last if step == steps else rest
        self._say(
            f"step {step}/{steps}  {_clock(elapsed)} elapsed  {rest}", "" if self.live else "\n"
        )

    def close(self, text: str) -> None:
        """The line's last words."""
        self._say(text, "\n")

    def _say(self, text: str, end: str) -> None:
        self.console.write(
            f"{chr(13) + chr(27) + '[K' if self.live else ''}{self.label}  {text}{end}"
        )
        self.console.flush()


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
