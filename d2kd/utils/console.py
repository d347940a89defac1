"""Console output of a study: a progress line per run; everything else is in the run's log."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import TextIO

from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from tqdm import tqdm

ProgressCallback = Callable[[int, int], None]
"""Called with the number of items done and of all items, such as training steps."""

LOGGERS = ("d2kd", "detectron2", "fvcore")
"""Loggers whose records are in a run's log."""


def log_to_console() -> None:
    """Show the records of :data:`LOGGERS` on the console, unless logging is already set up."""
    for name in LOGGERS:
        if not logging.getLogger(name).isEnabledFor(logging.INFO):
            setup_logger(name=name, distributed_rank=comm.get_rank())


@contextlib.contextmanager
def suppress_output() -> Iterator[None]:
    """Suppress console output of d2kd, Detectron2 and pycocotools; the run's log has the log records."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [logging.NullHandler()], False
        logger.setLevel(logging.INFO)  # otherwise log_to_console() would add a handler
    try:
        with (
            open(os.devnull, "w") as devnull,
            contextlib.redirect_stdout(devnull),
            contextlib.redirect_stderr(devnull),
        ):
            yield
    finally:
        for logger, (handlers, level, propagate) in zip(loggers, before):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)


class ProgressBar(tqdm):
    """A progress line: i/n, elapsed and remaining time. If it is not a terminal, a new line every 30 s.

    Args:
        label: the beginning of the line.
        console: the output stream.
        live: whether to redraw the line in place; False if other lines are written at the same time.
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
            bar_format="{desc}  {n_fmt}/{total_fmt}  {elapsed} elapsed  {remaining} left",
        )

    def __call__(self, done: int, total: int) -> None:
        """Set the number of finished items; the first call sets the start."""
        if self.total is None:
            self.total, self.initial, self.n = total, done, done
            self.start_t = self.last_print_t = self._time()
            self.last_print_n = done
            self.refresh()
        else:
            self.update(done - self.n)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Redraw the line as tqdm does, if it is live."""
        if self.live:
            return super().display(msg, pos)
        if msg is None and self.total is not None:
            self.fp.write(f"{self}\n")
            self.fp.flush()
        return False

    def close(self, text: str | None = None) -> None:
        """End the line, with a closing text if it is given."""
        if self.disable:
            return
        super().close()
        if text is not None:
            self.fp.write(f"{self.desc}  {text}\n")
            self.fp.flush()
