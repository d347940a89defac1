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
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

import cloudpickle
import torch
import yaml
from detectron2.utils import comm
from detectron2.utils.registry import _convert_target_to_string, locate
from omegaconf import DictConfig, OmegaConf

from .. import __version__
from ..data.catalog import REGISTERED_BY
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
    """SHA-256 of a config's content: equal for equal configs, whatever file or process they come from.

    A class or function counts by its name, any other object by its class and what it holds. Code is not looked at.
    """
    text = json.dumps(_content(node), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _content(value: Any) -> Any:
    if OmegaConf.is_config(value):
        return _content(OmegaConf.to_container(value, resolve=True))
    if isinstance(value, Mapping):
        return {str(key): _content(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_content(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if hasattr(value, "__qualname__"):
        return importable_name(value) or value.__qualname__
    # Its repr may be its address.
    held = _content(vars(value)) if hasattr(value, "__dict__") else repr(value)
    return [_content(type(value)), held]


def importable_name(value: Any) -> str | None:
    """The name by which any process can import a class or function; None for one that no module has."""
    if getattr(value, "__module__", None) in (None, "__main__"):
        return None
    with contextlib.suppress(Exception):  # of whatever is imported on the way
        name = _convert_target_to_string(value)
        if locate(name) == value:
            return name
    return None


def save_config(config: DictConfig, path: str | Path) -> None:
    """Write a config as YAML that builds the same again: by ``LazyConfig.load``, and so by any of d2kd's commands.

    Classes and functions of modules stand there by their names. Those that no module has, such as a lambda or a class
    of the recipe's own file, and objects that YAML does not know are in it as one pickle, which a later version of
    Python may fail to read. A data set that a recipe's or a study's file registers stands there with that file, which
    is run again. Reading such a YAML executes code, as a recipe does.

    Raises:
        InputError: the config holds what cannot be pickled.
    """
    content = _to_write(OmegaConf.to_container(config, resolve=False))
    layout = {"sort_keys": False, "default_flow_style": None, "allow_unicode": True, "width": 9999}
    try:
        text = yaml.dump(content, Dumper=_Dumper, **layout)
    except Exception as error:  # an object decides itself how it fails
        expected = "a recipe of values that can be pickled"
        raise InputError(path, f"cannot be written ({error})", expected) from error
    write_text(path, text)


class _Registered(str):
    """The name of a data set that a file of configs registers."""


def _to_write(value: Any) -> Any:
    if isinstance(value, dict):
        value = {key: _to_write(item) for key, item in value.items()}
        target = value.get("_target_")
        return (
            value | {"_target_": importable_name(target) or target} if callable(target) else value
        )
    if isinstance(value, list):
        return [_to_write(item) for item in value]
    return _Registered(value) if isinstance(value, str) and value in REGISTERED_BY else value


class _Dumper(yaml.Dumper):
    """Keeps what YAML has no word for in one pickle, so that what its parts share stays shared."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._pickled: list[Any] = []
        self._pickle = yaml.ScalarNode("tag:yaml.org,2002:binary", "", style="|")
        self._all = self._call("pickle.loads", [self._pickle])

    def represent(self, data: Any) -> None:
        node = self.represent_data(data)
        self._pickle.value = self.represent_binary(cloudpickle.dumps(self._pickled)).value
        self.serialize(node)

    def _call(self, function: str, arguments: list[yaml.Node]) -> yaml.Node:
        return yaml.SequenceNode(f"tag:yaml.org,2002:python/object/apply:{function}", arguments)

    def represent_other(self, data: Any) -> yaml.Node:
        kind = type(data)
        if hasattr(data, "__qualname__"):
            if (name := importable_name(data)) is not None:
                return self._call(f"{locate.__module__}.locate", [self.represent_data(name)])
        elif hasattr(data, "__dict__") and importable_name(kind) is not None:
            if (kind.__reduce__, kind.__reduce_ex__) == (object.__reduce__, object.__reduce_ex__):
                return self.represent_object(data)
        self._pickled.append(data)
        index = self.represent_data(len(self._pickled) - 1)
        return self._call("operator.getitem", [self._all, index])

    def represent_registered(self, name: str) -> yaml.Node:
        arguments = [self.represent_data(text) for text in (str(name), REGISTERED_BY[name])]
        return self._call("d2kd.data.catalog.registered", arguments)


for _kind in (type, FunctionType, BuiltinFunctionType):
    _Dumper.add_representer(_kind, _Dumper.represent_other)
_Dumper.add_multi_representer(object, _Dumper.represent_other)
_Dumper.add_representer(_Registered, _Dumper.represent_registered)


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
