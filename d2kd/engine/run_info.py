"""What a run leaves beside its weights: versions, hashes, its log, and files that are whole or absent."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import logging.handlers
import math
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from detectron2.config import LazyConfig
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf

from .. import __version__
from ..errors import InputError

LOGGERS = ("d2kd", "detectron2", "fvcore")
"""Who speaks during a run."""


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place on success: readers never see half a file.

    Nor do they after a loss of power: the content is on the disk before it has its name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _to_disk(temporary)
        os.replace(temporary, path)
        _to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporaries(folder: Path) -> None:
    """Remove what a process that was killed could not: each would hold a checkpoint's place for ever."""
    for left in folder.glob(".*.tmp"):
        left.unlink(missing_ok=True)
    for left in folder.glob(f"{_CONFIG}*"):
        shutil.rmtree(left, ignore_errors=True)


_CONFIG = ".config"


def disk_is_full(error: BaseException) -> str | None:
    """What the system says, if an error or what it came from is that a disk, a quota or a file is full."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return seen.strerror
        seen = seen.__cause__ or seen.__context__
    return None


@contextlib.contextmanager
def explaining_full_disk(path: str | Path) -> Iterator[None]:
    """Raise that the disk is full, if that is what happened inside, as what it is: the user's to mend."""
    try:
        yield
    except InputError:
        raise
    except (OSError, RuntimeError) as error:  # torch's writer hides the first behind the second
        said = disk_is_full(error)
        if said is None:
            raise
        expected = (
            "room on the disk; what was written before is whole, and --resume goes on from it"
        )
        raise InputError(path, f"cannot be written ({said})", expected) from error


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON whole or not at all; what is not a number there is ``null``."""
    write_text(path, json.dumps(_plain(content), indent=1, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):  # NumPy's float64 is one
        return float(value) if math.isfinite(value) else None
    return value


def read_rows(path: str | Path) -> list[dict]:
    """The ``rows`` of one of our JSON files; none where there is no such file, or no sense in it."""
    try:
        return list(json.loads(Path(path).read_text())["rows"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def versions() -> dict[str, str | None]:
    """What a result depends on besides its config."""
    names = ("torchvision", "detectron2", "numpy", "fvcore", "pycocotools", "pillow")
    found: dict[str, str | None] = {"d2kd": __version__, "python": platform.python_version()}
    found["torch"] = torch.__version__
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    found["platform"] = platform.platform()
    found["cuda_device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return found


def config_hash(node: Any) -> str:
    """SHA-256 of a config node's content: equal nodes of two files have equal hashes."""
    text = json.dumps(node, sort_keys=True, default=_describe)
    return hashlib.sha256(text.encode()).hexdigest()


def _describe(value: Any) -> Any:
    """A node by its content, a class or function by its name, anything else as it prints."""
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=True)
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value)


def save_config(config: DictConfig, path: str | Path) -> None:
    """The full config as ``LazyConfig.save`` writes it, put in place when it is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=_CONFIG) as folder:
        LazyConfig.save(config, str(Path(folder, path.name)))
        for file in Path(folder).iterdir():  # a config that YAML cannot hold comes with a pickle
            shutil.move(file, path.parent / file.name)


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
        return int(self._written().get("begun", 0))

    def load(self) -> None:
        """Go on with the record of the run that is resumed."""
        written = self._written()
        self.content |= {k: written[k] for k in ("begun", "teacher") if k in written}
        self.content["rows"] = read_rows(self._path)

    def _written(self) -> dict:
        """What the file says; nothing where there is none, or no sense in it."""
        with contextlib.suppress(OSError, ValueError):
            if isinstance(found := json.loads(self._path.read_text()), dict):
                return found
        return {}

    def begin(self, **row: Any) -> None:
        started = datetime.now(UTC).isoformat(timespec="seconds")
        if not self.content["rows"]:
            self.set()  # a file's time is told by the clock that tells those of checkpoints
            self.content["begun"] = self._path.stat().st_mtime_ns
        self.content["rows"].append({"started": started, **row})
        self.set()

    def end(self, iteration: int, seconds: float, results: dict) -> None:
        """Say how far it came, after how many seconds of training, and the last evaluation."""
        if self.content["rows"]:
            self.content["rows"][-1] |= {
                "iterations": iteration,
                "seconds": seconds,
                "results": results,
            }
            self.set()

    def set(self, **values: Any) -> None:
        self.content |= values
        if comm.is_main_process():
            write_json(self._path, self.content)
