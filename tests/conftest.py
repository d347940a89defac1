"""Every test begins alike: with a seed, a cache of its own, and Detectron2's logging set up but not on the console."""

import gc
import logging
import re

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2kd.utils.console import LOGGERS

from .common import refusal

_LOGGERS = [logging.getLogger(name) for name in LOGGERS]


def pytest_collection_finish():
    """What was imported is left out of collections of garbage: a full one would look at it for 0.2 seconds each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def apart_from_the_user(tmp_path_factory):
    """Also what module's fixtures do, which begin before a test's."""
    for logger in _LOGGERS:  # or a trainer would add a handler on pytest's stdout of the moment
        logger.setLevel(logging.INFO)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("D2KD_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("D2KD_DATASETS", raising=False)
        yield


@pytest.fixture(autouse=True)
def apart_from_other_tests(tmp_path, monkeypatch):
    monkeypatch.setenv("D2KD_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in _LOGGERS]
    datasets = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - datasets:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)
    for logger, (handlers, level, propagate) in zip(_LOGGERS, before):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture
def refuses(tmp_path, monkeypatch, capfd):
    """``refuses(act, match)``: `act` ends as :func:`common.refusal` has it, and leaves all files in its folder alone."""
    monkeypatch.chdir(tmp_path)

    def contents():
        return {file: file.is_file() and file.read_bytes() for file in tmp_path.rglob("*")}

    def check(act, match):
        before = contents()
        line = refusal(act, None, capfd)
        assert re.search(match, line), line
        assert contents() == before

    return check
