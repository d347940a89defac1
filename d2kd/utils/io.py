"""Atomic writing of files, and errors of a full disk."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import InputError


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Write a file atomically: yield a temporary path beside ``path``, and rename it to ``path`` on success.

    The content is flushed to the disk before it is renamed, so that this holds after a loss of power, too.
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


def check_output_folder(folder: str | Path, culprit: str = "train.output_dir") -> None:
    """Check that a folder is there or can be made, before work begins that is written to it.

    Raises:
        InputError: it is a file, lies in one, cannot be written, or has an invalid name.
    """
    path = Path(folder)
    if re.match(r"\w+://", str(folder)):
        raise InputError(culprit, folder, "a local folder")
    try:
        if "\0" in str(folder):
            raise ValueError("a null character")
        there = next(one for one in (path, *path.absolute().parents) if one.exists())
        os.fsencode(path).decode("utf-8")  # a name that config.yaml and run.json can hold
    except (OSError, ValueError) as error:  # it is too long, or not UTF-8
        raise InputError(
            culprit, f"{str(folder)!a} is no valid name ({error})", "a folder"
        ) from error
    if not there.is_dir():
        raise InputError(culprit, f"{there} is a file", "a folder")
    if not os.access(there, os.W_OK):
        raise InputError(culprit, f"{there} cannot be written", "a folder that can")


def remove_temporary_files(folder: Path) -> None:
    """Remove the temporary files of killed processes, which are as large as checkpoints."""
    for file in folder.glob(".*.tmp"):
        file.unlink(missing_ok=True)


def full_disk_message(error: BaseException) -> str | None:
    """Return the system's message if an error, or one of its causes, is a full disk, quota or file; otherwise None."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return None


@contextlib.contextmanager
def report_full_disk(path: str | Path, again: str = "--resume") -> Iterator[None]:
    """Raise InputError if the code inside fails because the disk is full; ``again`` is what continues afterwards."""
    try:
        yield
    except InputError:
        raise
    except (OSError, RuntimeError) as error:  # torch's writer raises a RuntimeError from it
        reason = full_disk_message(error)
        if reason is None:
            raise
        expected = f"room on the disk; earlier files are whole, and {again} continues from them"
        raise InputError(path, f"cannot be written ({reason})", expected) from error


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file atomically; numbers that are not finite become ``null``."""
    write_text(path, json.dumps(_plain(content), indent=1, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):  # NumPy's float64 is one
        return float(value) if math.isfinite(value) else None
    return value


def read_json(path: str | Path) -> dict:
    """Return the dict in a JSON file; an empty one if the file is missing or invalid."""
    with contextlib.suppress(OSError, ValueError):
        if isinstance(found := json.loads(Path(path).read_text()), dict):
            return found
    return {}


def read_rows(path: str | Path) -> list[dict]:
    """Return the list ``rows`` of a JSON file that d2kd has written; an empty one if there is none."""
    rows = read_json(path).get("rows")
    return rows if isinstance(rows, list) else []


def truncate_metrics(path: str | Path, iteration: int) -> None:
    """Remove the lines of ``metrics.json`` from an iteration on, which a resumed run will write again."""
    path = Path(path)
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError, KeyError):  # a line is incomplete after a crash
            if json.loads(line)["iteration"] < iteration:
                kept.append(line + "\n")
    write_text(path, "".join(kept))


def read_metrics(path: Path) -> list[dict]:
    """Read a run's metrics.json, one dict per iteration.

    If a resumed run has repeated an iteration, the last values are used. Incomplete lines are skipped.
    """
    found: dict[int, dict] = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError, TypeError, KeyError):
            entry = json.loads(line)
            found.setdefault(entry["iteration"], {}).update(entry)
    return [found[i] for i in sorted(found)]
