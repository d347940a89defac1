"""Versions of packages, and hashes of configs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch
from detectron2.utils.registry import _convert_target_to_string, locate
from omegaconf import OmegaConf

from .. import __version__


def collect_versions() -> dict[str, str | None]:
    """Return the versions of packages, Python, platform and GPU on which a result depends."""
    names = ("torchvision", "timm", "detectron2", "numpy", "fvcore", "pycocotools", "pillow")
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
    """Return the SHA-256 of a config's content, which is equal for equal configs of different files or processes.

    A class or function is hashed by its name, any other object by its class and attributes. Code is not hashed.
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
        return import_path(value) or value.__qualname__
    # Its repr may contain its address.
    held = _content(vars(value)) if hasattr(value, "__dict__") else repr(value)
    return [_content(type(value)), held]


def import_path(value: Any) -> str | None:
    """Return the name by which any process can import a class or function; None if there is none."""
    if getattr(value, "__module__", None) in (None, "__main__"):
        return None
    with contextlib.suppress(Exception):  # of any module that is imported by locate
        name = _convert_target_to_string(value)
        if locate(name) == value:
            return name
    return None
