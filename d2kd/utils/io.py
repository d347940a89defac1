"""Files that are whole or absent, and disks that are full."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import InputError


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


def read_json(path: str | Path) -> dict:
    """What a JSON file says; nothing where there is no such file, or no sense in it."""
    with contextlib.suppress(OSError, ValueError):
        if isinstance(found := json.loads(Path(path).read_text()), dict):
            return found
    return {}


def read_rows(path: str | Path) -> list[dict]:
    """The ``rows`` of one of our JSON files; none where :func:`read_json` finds none."""
    rows = read_json(path).get("rows")
    return rows if isinstance(rows, list) else []
