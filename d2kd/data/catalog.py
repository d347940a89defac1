"""Helpers to register custom data sets of any format."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathHandler, PathManager
from omegaconf import OmegaConf

from ..utils.errors import InputError

LONGEST_SIDE = 100_000
"""Pixels: COCO's evaluation ignores objects that are larger than the square."""

REGISTERED_BY: dict[str, str] = {}
"""Data set name -> the Python config file that registered it in this process."""


INCREMENT_KEY = "d2kd_increment"
"""Key of a COCO-style file with the annotated classes of an increment, see :mod:`d2kd.data.incremental`."""


@contextlib.contextmanager
def recording_registrations(file: str | Path) -> Iterator[None]:
    """While a config file is loaded: add the data sets that its code registers to :data:`REGISTERED_BY`."""
    before = set(DatasetCatalog.list())
    yield
    if str(file).endswith(".py"):  # a saved config already refers to the registering files
        new = set(DatasetCatalog.list()) - before
        REGISTERED_BY.update(dict.fromkeys(new, str(Path(file).resolve())))


def ensure_registered(name: str, file: str) -> str:
    """Return the name of a data set; if it is not registered, first load the config file that registers it."""
    if name not in DatasetCatalog.list():
        with recording_registrations(file):
            LazyConfig.load(file)
    return name


def expand_path(path: str, content: str) -> str:
    """Replace an environment variable at the start of a path, as in ``"$BIRDS/2024"``.

    Args:
        content: what the variable should be set to, for the error.

    Raises:
        InputError: if the variable is not set.
    """
    variable = re.match(r"\$(\w+)", path)
    if variable and not os.environ.get(variable[1]):
        raise InputError(variable[1], "not set", content)
    return os.path.expandvars(path)


def is_registered(name: str, given: tuple) -> bool:
    """Return whether ``name`` is already registered for this data: the same file, folder and classes.

    Raises:
        InputError: if the name is registered for other data.
    """
    if name not in DatasetCatalog.list():
        return False
    known = MetadataCatalog.get(name).get("registered_as")
    if known != given:
        found = f"already registered as {known[0]} in {known[1]}" if known else "already registered"
        raise InputError(f"data set {name!r}", found, f"a name not yet taken for {given[0]}")
    return True


def register_from_config(recipe, dataset: str) -> None:
    """Register a data set if a recipe has a node for it, such as ``names=L(coco_dataset)(name=…)``."""
    for part in ("train", "test"):
        names = OmegaConf.select(recipe, f"dataloader.{part}.dataset.names", default=None)
        for node in names if OmegaConf.is_list(names) else [names]:
            # A node without a name, such as one increment's, may register it, too.
            if OmegaConf.is_dict(node) and node.get("name", dataset) == dataset:
                instantiate(node)


def check_files(names: Iterable[str], root: str, expected: str) -> None:
    """Check that files exist below a folder, with one listing per directory.

    Raises:
        InputError: if some are missing; the message names the first and counts the others of its directory.
    """
    folders = defaultdict(set)
    for name in names:
        folder, file = os.path.split(os.path.join(root, name))
        folders[folder].add(file)
    for folder, wanted in folders.items():
        present = PathManager.ls(folder) if PathManager.isdir(folder) else []
        if missing := sorted(wanted.difference(present)):
            refuse_missing(folder, missing, expected)


def refuse_missing(folder: str, names: Sequence[str], expected: str) -> NoReturn:
    """Raise InputError for files that a folder lacks; the message names the first and counts the others."""
    more = f", and {len(names) - 1} more of that folder" if len(names) > 1 else ""
    raise InputError(os.path.join(folder, names[0]), f"missing{more}", expected)


ANNOTATIONS_PREFIX = "d2kd_annotations://"


class _Annotations(PathHandler):
    """``d2kd_annotations://NAME``: annotations of a data set derived from another, written when the file is first opened.

    Training never opens it. The metadata of the data set has ``derived``, an object with the name of the other one,
    ``dataset``, and ``annotations()``, which returns the content.
    """

    def _get_supported_prefixes(self) -> list[str]:
        return [ANNOTATIONS_PREFIX]

    def _get_local_path(self, path: str, **_) -> str:
        part = MetadataCatalog.get(path.removeprefix(ANNOTATIONS_PREFIX)).derived
        whole = getattr(part, "dataset", None)
        source = MetadataCatalog.get(whole).get("json_file") if whole else part.json_file
        if whole and (prepare := MetadataCatalog.get(whole).get("prepare")):
            prepare()  # a generated set is drawn
        # By the content, because the other's file may be corrected and read again.
        file = source and Path(PathManager.get_local_path(source))
        return _write_annotations(part, file and file_digest(file.read_bytes()))

    def _isfile(self, path: str, **_) -> bool:
        return path.removeprefix(ANNOTATIONS_PREFIX) in DatasetCatalog.list()

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **options):
        options = {k: v for k, v in options.items() if k in ("encoding", "newline")}
        return open(self._get_local_path(path), mode, buffering, **options)


PathManager.register_handler(_Annotations())


def file_digest(content: bytes) -> str:
    """Return the hash by which results of reading a file are kept."""
    return hashlib.blake2b(content).hexdigest()


@functools.cache
def _write_annotations(part, digest: str | None) -> str:
    """Write the file, which this process deletes at exit; a new one if the digest of its source has changed."""
    folder = tempfile.mkdtemp(prefix="d2kd_annotations_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    file = Path(folder, "annotations.json")
    file.write_text(json.dumps(part.annotations()))
    return str(file)
