"""What registering the user's own data needs, whatever its format."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager
from omegaconf import OmegaConf

from d2kd.utils.errors import InputError

REGISTERED_BY: dict[str, str] = {}
"""By name, the Python file of configs whose code registered a data set of this process."""


@contextlib.contextmanager
def registering(file: str | Path) -> Iterator[None]:
    """Inside, a file of configs is loaded; the data sets that its own code registers are remembered as its own."""
    before = set(DatasetCatalog.list())
    yield
    if str(file).endswith(".py"):  # a saved config says itself where its data come from
        new = set(DatasetCatalog.list()) - before
        REGISTERED_BY.update(dict.fromkeys(new, str(Path(file).resolve())))


def registered(name: str, file: str) -> str:
    """The name of a data set, registered if need be by loading the file of configs that does so."""
    if name not in DatasetCatalog.list():
        with registering(file):
            LazyConfig.load(file)
    return name


def is_registered(name: str, given: tuple) -> bool:
    """Whether `name` means this data already: the same file, folder and classes.

    Raises:
        InputError: it means other data.
    """
    if name not in DatasetCatalog.list():
        return False
    known = MetadataCatalog.get(name).get("registered_as")
    if known != given:
        found = f"already registered as {known[0]} in {known[1]}" if known else "already registered"
        raise InputError(f"data set {name!r}", found, f"a name not yet taken for {given[0]}")
    return True


def register_described(recipe, dataset: str) -> None:
    """Register a data set if a recipe describes it: ``names=L(coco_dataset)(name=…)``."""
    for part in ("train", "test"):
        names = OmegaConf.select(recipe, f"dataloader.{part}.dataset.names", default=None)
        for node in names if OmegaConf.is_list(names) else [names]:
            # A class step is called what its parts are called.
            if OmegaConf.is_dict(node) and node.get("name", dataset) == dataset:
                instantiate(node)


def check_files(names: Iterable[str], root: str, expected: str) -> None:
    """Look for files below a folder, with one listing per folder.

    Raises:
        InputError: naming the first that is missing, and how many more of its folder are.
    """
    folders = defaultdict(set)
    for name in names:
        folder, file = os.path.split(os.path.join(root, name))
        folders[folder].add(file)
    for folder, wanted in folders.items():
        present = PathManager.ls(folder) if PathManager.isdir(folder) else []
        if missing := sorted(wanted.difference(present)):
            more = f", and {len(missing) - 1} more of that folder" if len(missing) > 1 else ""
            raise InputError(os.path.join(folder, missing[0]), f"missing{more}", expected)
