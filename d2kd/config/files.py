"""Load configs by name, and detectors and recipes from any of Detectron2's config formats."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, LazyConfig, get_cfg
from detectron2.config import LazyCall as L
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.file_io import Detectron2Handler
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from ..data.catalog import recording_registrations
from ..modeling import (
    add_distiller_config,
    add_gfl_config,
    add_timm_config,
    add_torchvision_config,
)
from ..utils.errors import InputError
from .nodes import (
    Recipe,
    as_config,
    check_arguments,
    find_parameter,
    refuses_null,
    student_node,
)
from .train import check_train, train_field_type, with_defaults


def add_d2kd_config(cfg: CfgNode) -> None:
    """Add d2kd's keys to a yacs config: ``MODEL.DISTILLER``, ``MODEL.GFL``, ``MODEL.TIMM``, ``MODEL.TORCHVISION``."""
    add_distiller_config(cfg)
    add_gfl_config(cfg)
    add_timm_config(cfg)
    add_torchvision_config(cfg)


def get_config_file(name: str) -> Path:
    """Return the path of one of d2kd's configs or recipes: ``"common/train.py"``, ``"projects/TAR/…"``.

    In a source tree, ``configs`` and ``projects`` are beside the package; once installed, they are inside it.

    Raises:
        InputError: if there is no such file.
    """
    package = Path(__file__).parents[1]
    relative = Path(name) if name.startswith("projects/") else Path("configs", name)
    for root in (package, package.parent):
        if (root / relative).is_file():
            return root / relative
    raise InputError(name, "no such config", "a file of d2kd's configs/ or projects/")


def get_config(name: str) -> DictConfig:
    """Load one of d2kd's configs by name, as ``detectron2.model_zoo.get_config`` loads Detectron2's."""
    return LazyConfig.load(str(get_config_file(name)))


def _split(path: str) -> tuple[str, str]:
    """Split ``FILE.py:NAME``, one of several recipes in a file; without a name, it is empty."""
    file, suffix, name = path.rpartition(".py:")
    return (f"{file}.py", name) if suffix and name else (path, "")


def _find(path: str) -> Path:
    """Return the path of a config: a file, or the name of a config of d2kd or Detectron2's model zoo."""
    path, _ = _split(path)
    if Path(path).is_file():
        return Path(path)
    for find in (get_config_file, lambda name: Path(model_zoo.get_config_file(name))):
        try:
            return find(path)
        except (InputError, RuntimeError):
            continue
    raise InputError(
        path, "no such config", "a LazyConfig (.py), a yacs YAML, or a model zoo name of either"
    )


def _is_yacs(path: Path) -> bool:
    """Return whether a file is a yacs config. A YAML file with a ``model`` is a saved LazyConfig."""
    if path.suffix not in (".yaml", ".yml"):
        return False
    return not re.search(r"^model:", path.read_text(errors="replace"), flags=re.MULTILINE)


def _load_lazy_config(path: str) -> DictConfig:
    """Load a LazyConfig that defines at least a model.

    Raises:
        InputError: if the file is missing, fails to load, or defines no model.
    """
    file, (_, name) = _find(path), _split(path)
    try:
        with recording_registrations(file):
            config = LazyConfig.load(str(file), name or None)
    except InputError:
        raise
    except Exception as error:  # a config is code and may raise anything
        if name and isinstance(error, KeyError) and error.args == (name,):
            raise InputError(path, f"no {name!r} in the file", "the name of a recipe") from None
        raise InputError(
            path, f"does not load ({type(error).__name__}: {error})", "a LazyConfig"
        ) from error
    if isinstance(config, Recipe):
        config = as_config(config)
    if not OmegaConf.is_dict(config) or config.get("model") is None:
        raise InputError(path, "defines no model", "a LazyConfig with model=L(…)(…)")
    return config


def load(path: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Load a LazyConfig recipe and apply overrides such as ``train.max_iter=100``.

    The file is a Python file or the ``config.yaml`` of an earlier run. ``FILE.py:NAME`` is one of several recipes in a
    Python file: a :class:`Recipe` or a dict with this name. Missing keys of ``train`` get their
    defaults, see :class:`d2kd.config.Train`.

    Raises:
        InputError: if the file is missing, is not a complete LazyConfig recipe, or fails to load; or if ``train``
            or an override has an unknown key or a value of the wrong type.
    """
    file = _find(path)
    if _is_yacs(file):
        raise InputError(
            path,
            "a yacs config",
            "a LazyConfig (.py); a YAML can be a detector, not a whole recipe",
        )
    config = _load_lazy_config(path)
    if "train" in config and Path(model_zoo.__file__).parent in file.parents:
        config.train.device = "auto"  # the zoo's default is CUDA, which this machine may lack
    return apply_overrides(with_defaults(config, path), overrides)


def apply_overrides(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return a recipe with overrides such as ``train.max_iter=100`` applied.

    Values are read by hydra's grammar, as in Detectron2: numbers, ``true``, ``null``, ``[a,b]``, ``{a:1}``. Where the
    recipe has text, the value is that text, whatever characters it has, without quotes around all of it. Where it has
    a number or a truth value, one of the same kind is expected.

    Raises:
        InputError: if an override cannot be parsed, has an unknown key, or a value of the wrong type; or a node has an
            argument that its ``_target_`` does not take.
    """
    config = as_config(config)
    for text in overrides:
        _check_override(config, text)
        key, given, value = text.partition("=")
        try:
            if not given:
                raise ValueError("deletion is not supported")
            key = key.lstrip("+")
            value = _read_value(config, key, value)
            # A list takes the place of a node, such as the one that registers a data set.
            merge = not (
                isinstance(value, list) and OmegaConf.is_dict(OmegaConf.select(config, key))
            )
            OmegaConf.update(config, key, value, merge=merge)
        except InputError:
            raise
        except Exception as error:  # OmegaConf has many
            raise InputError(key, error, "an override such as train.max_iter=100") from error
    check_train(config)
    check_arguments(config)
    return config


_PARSER = OverridesParser.create()


def _read_value(config: DictConfig, key: str, text: str) -> Any:
    """Return the value of an override's text, of the kind of the recipe's value.

    Raises:
        InputError: it is of another kind, or cannot be read.
    """
    try:
        former = OmegaConf.select(config, key)
    except OmegaConfBaseException:  # an interpolation without a target
        former = None
    argument = find_parameter(config, key)
    if former is None and argument is not None and argument.default is not argument.empty:
        former = argument.default
    text = text.strip()
    try:
        value: Any = _PARSER.parse_override(f"key={text}").value()
    except Exception:  # not in hydra's grammar, as most text with other than ASCII letters
        value = None if text[:1] in ("[", "{") else _unquoted(text)
        readable = value is not None
    else:
        readable = value is None or isinstance(value, bool | int | float | str | list | dict)
        if isinstance(value, str) and "\\" in text:  # hydra takes the one before a comma away
            value = _unquoted(text)
    if train_field_type(key) is str and not (readable and isinstance(value, bool | None)):
        return _unquoted(text)
    if isinstance(former, bool | int | float) and readable and not isinstance(value, dict):
        return _same_kind(key, value, former, argument)
    if not readable and (
        former is None or isinstance(former, str)
    ):  # a sweep, as of "a,b"; or "[a"
        readable, value = text[:1] not in ("[", "{"), _unquoted(text)
    if not readable:
        raise InputError(key, text, _kind(former))
    return value


def _unquoted(text: str) -> str:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted and text[0] not in text[1:-1] else text


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int):
        return "an integer"
    if isinstance(value, float):
        return "a number"
    return "one value, or a list such as [a,b]"


_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _same_kind(key: str, value: Any, former: float, argument: inspect.Parameter | None) -> Any:
    """Return a value as the kind of the former one, if that is what it says.

    Raises:
        InputError: it says something else.
    """
    if isinstance(value, str) and "${" in value:
        return value
    if value is None and not refuses_null(argument):
        return None
    if isinstance(former, bool):
        if str(value).lower() in _TRUTH:
            return _TRUTH[str(value).lower()]
        if value in (0, 1):
            return bool(value)
    elif isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(value)
            # A float may be meant where the recipe has a whole number by chance, such as a weight of 1.
            whole = isinstance(value, int) or (isinstance(former, int) and number == int(number))
            if math.isfinite(number):
                return int(number) if whole else number
    found = "null" if value is None else "nothing" if value == "" else value
    raise InputError(key, found, _kind(former))


def _check_override(config: DictConfig, override: str) -> None:
    """Raise InputError for an unknown key. A new key may only be an argument of a ``_target_``."""
    key = override.split("=", 1)[0].lstrip("+~")
    if "=" not in override and not override.startswith("~"):
        raise InputError(override, "no value", "KEY=VALUE")
    node: Any = config
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if not OmegaConf.is_config(node):
            raise InputError(key, f"{'.'.join(parts[:depth])} has no keys", "an existing key")
        if OmegaConf.is_list(node):
            node = node[int(part)] if part.isdigit() and int(part) < len(node) else None
        elif part in node:
            node = node[part]
        elif "_target_" in node and depth == len(parts) - 1:
            return
        elif parts[:2] == ["train", "user"]:
            return
        else:
            raise InputError(
                key, f"no {part!r} in {'.'.join(parts[:depth]) or 'the config'}", "an existing key"
            )


def build_model_from_yacs(config: DictConfig) -> nn.Module:
    """Build the detector of a yacs config, given as a plain mapping, on the CPU."""
    cfg = get_cfg()
    add_d2kd_config(cfg)
    cfg.merge_from_other_cfg(CfgNode(OmegaConf.to_container(config, resolve=True)))
    cfg.MODEL.DEVICE = "cpu"
    return META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)


def get_detector_config(path: str) -> DictConfig:
    """Return the model node of a zoo config, a LazyConfig or a yacs YAML, to use as student or teacher.

    If the model is a :class:`Distiller`, its student is returned. The node includes the pixel statistics and
    the channel order: for a yacs config, it holds the complete config.

    Raises:
        InputError: if there is no such config, or it fails to load or has no model.
    """
    file = _find(path)
    if _is_yacs(file):
        cfg = get_cfg()
        add_d2kd_config(cfg)
        try:
            cfg.merge_from_file(str(file))
        except Exception as error:  # a YAMLError, or yacs's KeyError and AssertionError
            raise InputError(
                path, f"does not load ({error})", "a Detectron2 yacs config"
            ) from error
        return L(build_model_from_yacs)(config=yaml.safe_load(cfg.dump()))
    return student_node(_load_lazy_config(path).model)


ZOO = "zoo:"
"""Prefix of the name of a trained detector in Detectron2's model zoo."""
TIMM = "timm:"
"""Prefix of the name of a classifier in timm, which teaches features alone."""


def zoo_detector(name: str) -> tuple[str, str, str]:
    """Return config, weights and training data set of a trained detector of Detectron2's model zoo.

    Args:
        name: "zoo:COCO-Detection/faster_rcnn_R_101_FPN_3x", or another that :mod:`detectron2.model_zoo` has.

    Returns:
        config, weights, data set: the config's name, a ``detectron2://`` URL, and the name of a registered data set
        with the detector's class names.

    Raises:
        InputError: if the zoo has no such detector.
    """
    configs = Path(model_zoo.__file__).parent / "configs"
    stem = name.removeprefix(ZOO).removesuffix(".yaml").removesuffix(".py")
    try:
        url = model_zoo.get_checkpoint_url(stem)
    except RuntimeError:
        files = (path.relative_to(configs).with_suffix("") for path in configs.glob("*/*"))
        near = difflib.get_close_matches(stem, map(str, files), n=20, cutoff=0.3)
        near = [ZOO + other for other in dict.fromkeys(near) if _is_trained(other)][:3]
        expected = ", or ".join(near) or f"{ZOO}COCO-Detection/faster_rcnn_R_101_FPN_3x, or another"
        raise InputError(name, "not in Detectron2's model zoo", expected) from None
    weights = Detectron2Handler.PREFIX + url.removeprefix(Detectron2Handler.S3_DETECTRON2_PREFIX)
    if (configs / f"{stem}.yaml").is_file():
        cfg = get_cfg()
        cfg.merge_from_file(str(configs / f"{stem}.yaml"))
        return f"{stem}.yaml", weights, cfg.DATASETS.TRAIN[0]
    return f"{stem}.py", weights, _load_lazy_config(f"{stem}.py").dataloader.train.dataset.names


def _is_trained(name: str) -> bool:
    try:
        return bool(model_zoo.get_checkpoint_url(name))
    except RuntimeError:
        return False


def load_recipe_or_none(path: str) -> DictConfig | None:
    """Load a LazyConfig recipe; None for a yacs config, or for a LazyConfig without a ``dataloader``.

    Raises:
        InputError: if there is no such config, or it fails to load or has no model.
    """
    if _is_yacs(_find(path)):
        return None
    config = _load_lazy_config(path)
    return config if "dataloader" in config else None


def get_test_mapper(config: str | DictConfig) -> DictConfig | None:
    """Return the node of the dataset mapper for a detector's test images.

    Args:
        config: a recipe with a ``dataloader.test.mapper``, or the path of a yacs config with an ``INPUT`` node.

    Returns:
        DictConfig or None: None if the config has neither.
    """
    if OmegaConf.is_config(config):
        return OmegaConf.select(config, "dataloader.test.mapper", default=None)
    file = _find(config)
    if not _is_yacs(file):
        return None
    cfg = get_cfg()
    add_d2kd_config(cfg)
    cfg.merge_from_file(str(file))
    size = cfg.INPUT.MIN_SIZE_TEST
    resize = L(T.ResizeShortestEdge)(short_edge_length=size, max_size=cfg.INPUT.MAX_SIZE_TEST)
    return L(DatasetMapper)(
        is_train=False, augmentations=[resize] if size else [], image_format=cfg.INPUT.FORMAT
    )
