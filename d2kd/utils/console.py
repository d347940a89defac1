"""A study's screen: one line per run, everything else in the run's log."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import TextIO

from tqdm import tqdm

LOGGERS = ("d2kd", "detectron2", "fvcore")
"""Whose log a run keeps."""


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


class Progress(tqdm):
    """A line on the screen: step i/n, elapsed, left. Into a pipe, a new line every half minute.

    Args:
        label: what is under way.
        console: where.
        live: False where other lines are written meanwhile; then it is as into a pipe.
    """

    monitor_interval = 0  # no thread

    def __init__(self, label: str, console: TextIO, live: bool = True):
        self.live = live and console.isatty()
        super().__init__(
            desc=label,
            file=console,
            leave=False,
            mininterval=0.2 if self.live else 30,
            miniters=1,
            smoothing=0,
            position=0,
            bar_format="{desc}  step {n_fmt}/{total_fmt}  {elapsed} elapsed  {remaining} left",
        )

    def __call__(self, step: int, steps: int) -> None:
        """Say that so many of the steps are done; the first call is where they begin."""
        if self.total is None:
            self.total, self.initial, self.n = steps, step, step
            self.start_t = self.last_print_t = self._time()
            self.last_print_n = step
            self.refresh()
        else:
            self.update(step - self.n)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """As tqdm, if the line is live."""
        if self.live:
            return super().display(msg, pos)
        if msg is None and self.total is not None:
            self.fp.write(f"{self}\n")
            self.fp.flush()
        return False

    def close(self, text: str | None = None) -> None:
        """End the line, with last words if there are any."""
        if self.disable:
            return
        super().close()
        if text is not None:
            self.fp.write(f"{self.desc}  {text}\n")
            self.fp.flush()
