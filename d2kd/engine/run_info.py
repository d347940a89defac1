"""Files of a run besides its checkpoints: ``metrics.json``, ``run.json`` with versions and results, and the log."""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from detectron2.utils import comm

from ..utils.console import LOGGERS
from ..utils.env import collect_versions
from ..utils.errors import InputError
from ..utils.io import full_disk_message, read_json, read_rows, write_json


class RunLog:
    """A run's log, which begins before the output folder exists.

    Records are buffered in memory until :meth:`open` is called with the file.
    """

    def __init__(self):
        self._buffer = logging.handlers.MemoryHandler(2**16, flushLevel=logging.CRITICAL + 1)
        self._buffer.setLevel(logging.DEBUG)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Collect all records that are logged inside the block."""
        loggers = [logging.getLogger(name) for name in LOGGERS]
        for logger in loggers:
            logger.addHandler(self._buffer)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeHandler(self._buffer)
            self._buffer.flush()

    def open(self, path: str | Path) -> None:
        """Write the buffered records, and all later ones, to a file."""
        file = logging.FileHandler(path)
        # A full disk is reported once, on the console, which has these records, too.
        file.handleError = lambda record: None
        layout = "[%(asctime)s] %(name)s %(levelname)s: %(message)s"
        file.setFormatter(logging.Formatter(layout, "%Y-%m-%d %H:%M:%S"))
        self._buffer.setTarget(file)
        self._buffer.capacity = 1
        self._buffer.flush()

    def close(self) -> None:
        if self._buffer.target is not None:
            self._buffer.target.close()
            self._buffer.setTarget(None)


class RunMetadata:
    """``run.json``: command, versions, teacher and results of a run. Starting or resuming adds a row."""

    def __init__(self, path: Path):
        self._path = path
        self.content = {"schema": 1, "command": " ".join(sys.argv), "versions": collect_versions()}
        self.content |= {"start_time": 0, "teacher": None, "rows": []}

    @property
    def start_time(self) -> int:
        """Start time of the run in the folder, as a file's modification time in ns; 0 if unknown."""
        return int(read_json(self._path).get("start_time", 0))

    def load(self) -> None:
        """Load the record of the run that is resumed."""
        written = read_json(self._path)
        self.content |= {k: written[k] for k in ("start_time", "teacher") if k in written}
        self.content["rows"] = read_rows(self._path)

    def begin(self, **row: Any) -> None:
        started = datetime.now(UTC).isoformat(timespec="seconds")
        if not self.content["rows"]:
            self.set()  # so that the start time is from the same clock as the times of checkpoints
            self.content["start_time"] = self._path.stat().st_mtime_ns
        self.content["rows"].append({"started": started, **row})
        self.set()

    @property
    def is_finished(self) -> bool:
        """Whether the run in the folder has ended, its last evaluation included."""
        rows = self.content["rows"]
        return bool(rows) and rows[-1].get("finished", False)

    def end(
        self,
        iteration: int,
        seconds: float,
        results: dict,
        peak: int | None,
        finished: bool,
        images_used: dict[str, int] | None = None,
    ) -> None:
        """Complete the last row.

        Args:
            iteration: number of iterations.
            seconds: time spent in them.
            results: those of the last evaluation.
            peak: largest memory in bytes, or None.
            finished: whether nothing has interrupted the run.
            images_used: data set -> images that all iterations have used, repeated ones included; None: unknown.
        """
        if self.content["rows"]:
            self.content["rows"][-1] |= {
                "iterations": iteration,
                "seconds": seconds,
                "results": results,
                "peak_memory": peak,
                "finished": finished,
                "images_used": images_used,
            }
            self.set()

    def set(self, **values: Any) -> None:
        self.content |= values
        if comm.is_main_process():
            write_json(self._path, self.content)


@contextlib.contextmanager
def suppress_input_error_traceback() -> Iterator[None]:
    """Suppress the traceback that Detectron2's train loop logs, if the error is an InputError or a full disk."""

    def keep(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return error is None or not (isinstance(error, InputError) or full_disk_message(error))

    loop = logging.getLogger("detectron2.engine.train_loop")
    loop.addFilter(keep)
    try:
        yield
    finally:
        loop.removeFilter(keep)
