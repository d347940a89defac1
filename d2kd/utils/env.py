"""Versions of packages, and hashes of configs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
from collections.abc import Mapping
from functools import partial
from importlib import metadata
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
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

    A class or function is hashed by its name, any other object by its class and attributes. Code is not hashed, but
    that of a function without a name to import it by, such as a lambda.
    """
    text = json.dumps(_content(node, ()), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _content(value: Any, within: tuple[int, ...]) -> Any:
    """Return what is hashed of a value; ``within`` are the ids of the objects that hold it."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if id(value) in within:  # an object that holds itself
        return "itself"
    within = (*within, id(value))

    def of(item: Any) -> Any:
        return _content(item, within)

    if isinstance(value, Mapping):
        return {str(key): of(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [of(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if isinstance(value, torch.Tensor | np.ndarray):
        return [str(value.dtype), value.tolist()]
    if isinstance(value, partial):
        return ["partial", of(value.func), of(value.args), of(value.keywords)]
    if isinstance(value, MethodType):
        return [of(value.__func__), of(value.__self__)]
    if hasattr(value, "__qualname__"):
        name = import_path(value)
        if name is None and isinstance(value, FunctionType):
            return [value.__qualname__, *(of(part) for part in _code(value))]
        return name or value.__qualname__
    # Its repr may contain its address.
    held = of(vars(value)) if hasattr(value, "__dict__") else repr(value)
    return [of(type(value)), held]


def _code(function: FunctionType) -> tuple[Any, ...]:
    """Return what distinguishes a function from others of its name: code, constants, names, defaults and closure."""
    code, cells = function.__code__, function.__closure__ or ()
    constants = [one for one in code.co_consts if not isinstance(one, CodeType)]
    closure = [cell.cell_contents for cell in cells if cell != CellType()]
    defaults = [function.__defaults__, function.__kwdefaults__]
    return code.co_code.hex(), constants, code.co_names, defaults, closure


def import_path(value: Any) -> str | None:
    """Return the name by which any process can import a class or function; None if there is none."""
    if getattr(value, "__module__", None) in (None, "__main__"):
        return None
    with contextlib.suppress(Exception):  # of any module that is imported by locate
        name = _convert_target_to_string(value)
        if locate(name) == value:
            return name
    return None
