"""What a run leaves beside its weights: versions, hashes, its log, and files that are whole or absent."""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from detectron2.utils import comm

from ..utils.console import LOGGERS
from ..utils.env import versions
from ..utils.errors import InputError
from ..utils.io import disk_is_full, read_json, read_rows, write_json, write_text


def keep_metrics_before(path: str | Path, iteration: int) -> None:
    """Drop the lines of ``metrics.json`` that the run will write again, or all if it starts anew."""
    path = Path(path)
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError, KeyError):  # a line that a crash cut short
            if json.loads(line)["iteration"] < iteration:
                kept.append(line + "\n")
    write_text(path, "".join(kept))


class RunLog:
    """A run's log, from its first word, although its folder exists only once all input was found good.

    Records are kept in memory until :meth:`open` names the file.
    """

    def __init__(self):
        self._buffer = logging.handlers.MemoryHandler(2**16, flushLevel=logging.CRITICAL + 1)
        self._buffer.setLevel(logging.DEBUG)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take what is logged inside."""
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
        """Write to this file from now on, beginning with what was kept."""
        file = logging.FileHandler(path)
        # Where the disk is full the console says so, once; it has these lines, too.
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


class RunRecord:
    """``run.json``: what made the result. A row is one start of the run; resuming adds another."""

    def __init__(self, path: Path):
        self._path = path
        self.content = {"schema": 1, "command": " ".join(sys.argv), "versions": versions()}
        self.content |= {"begun": 0, "teacher": None, "rows": []}

    @property
    def begun(self) -> int:
        """When the run in the folder began, as a file's time in ns; 0 where that is not known."""
        return int(read_json(self._path).get("begun", 0))

    def load(self) -> None:
        """Go on with the record of the run that is resumed."""
        written = read_json(self._path)
        self.content |= {k: written[k] for k in ("begun", "teacher") if k in written}
        self.content["rows"] = read_rows(self._path)

    def begin(self, **row: Any) -> None:
        started = datetime.now(UTC).isoformat(timespec="seconds")
        if not self.content["rows"]:
            self.set()  # a file's time is told by the clock that tells those of checkpoints
            self.content["begun"] = self._path.stat().st_mtime_ns
        self.content["rows"].append({"started": started, **row})
        self.set()

    def end(self, iteration: int, seconds: float, results: dict, peak: int | None) -> None:
        """Say how far it came, after how many seconds of training, the last evaluation, and bytes at the peak."""
        if self.content["rows"]:
            self.content["rows"][-1] |= {
                "iterations": iteration,
                "seconds": seconds,
                "results": results,
                "peak_memory": peak,
            }
            self.set()

    def set(self, **values: Any) -> None:
        self.content |= values
        if comm.is_main_process():
            write_json(self._path, self.content)


@contextlib.contextmanager
def quiet_about_input_errors() -> Iterator[None]:
    """Keep Detectron2's loop from printing the traceback of an error that is the input's."""

    def keep(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return error is None or not (isinstance(error, InputError) or disk_is_full(error))

    loop = logging.getLogger("detectron2.engine.train_loop")
    loop.addFilter(keep)
    try:
        yield
    finally:
        loop.removeFilter(keep)
