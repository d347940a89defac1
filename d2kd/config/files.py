"""Configs by name, and detectors and whole recipes out of any of Detectron2's config kinds."""

from __future__ import annotations

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
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..data.catalog import registering
from ..modeling import add_distiller_config, add_gfl_config, add_torchvision_config
from ..utils.errors import InputError
from .nodes import student_of
from .train import check_train, with_defaults


def add_d2kd_config(cfg: CfgNode) -> None:
    """Add this project's keys to a yacs config: ``MODEL.DISTILLER``, ``MODEL.GFL``, ``MODEL.TORCHVISION``."""
    add_distiller_config(cfg)
    add_gfl_config(cfg)
    add_torchvision_config(cfg)


def config_file(name: str) -> Path:
    """Where a config or recipe of this project lies: ``"common/train.py"``, ``"projects/TAR/…"``.

    In a source tree configs and projects lie beside the package, in an installed one inside it.

    Raises:
        InputError: there is no such file.
    """
    package = Path(__file__).parents[1]
    relative = Path(name) if name.startswith("projects/") else Path("configs", name)
    for root in (package, package.parent):
        if (root / relative).is_file():
            return root / relative
    raise InputError(name, "no such config", "a file of d2kd's configs/ or projects/")


def get_config(name: str) -> DictConfig:
    """A config of this project by its name, the twin of ``detectron2.model_zoo.get_config``."""
    return LazyConfig.load(str(config_file(name)))


def _find(path: str) -> Path:
    """A config file: on disk, of this project, or of Detectron2's model zoo."""
    if Path(path).is_file():
        return Path(path)
    for look in (config_file, lambda name: Path(model_zoo.get_config_file(name))):
        try:
            return look(path)
        except (InputError, RuntimeError):
            continue
    raise InputError(
        path, "no such config", "a LazyConfig (.py), a yacs YAML, or a model zoo name of either"
    )


def _is_yacs(path: Path) -> bool:
    """Whether a file is a yacs config; a YAML with a model is a LazyConfig that was saved, as runs do."""
    if path.suffix not in (".yaml", ".yml"):
        return False
    return not re.search(r"^model:", path.read_text(errors="replace"), flags=re.MULTILINE)


def _read(path: str) -> DictConfig:
    """What a LazyConfig defines, a model and maybe more.

    Raises:
        InputError: the file is missing or fails to load, or defines no model.
    """
    file = _find(path)
    try:
        with registering(file):
            config = LazyConfig.load(str(file))
    except InputError:
        raise
    except Exception as error:  # a config is code, and may fail in any way
        raise InputError(
            path, f"does not load ({type(error).__name__}: {error})", "a LazyConfig"
        ) from error
    if not OmegaConf.is_dict(config) or config.get("model") is None:
        raise InputError(path, "defines no model", "a LazyConfig with a model")
    return config


def load(path: str, overrides: Sequence[str] = ()) -> DictConfig:
    """A LazyConfig recipe with overrides such as ``train.max_iter=100`` applied.

    It may be a Python file or the ``config.yaml`` of an earlier run. Missing keys of ``train`` have their defaults,
    see :class:`d2kd.config.Train`.

    Raises:
        InputError: the file is missing, is no LazyConfig or no whole recipe, or fails to load; ``train`` or an
            override has a key that does not exist, or a value of another type.
    """
    file = _find(path)
    if _is_yacs(file):
        raise InputError(
            path,
            "a yacs config",
            "a LazyConfig (.py); a YAML can be a detector, not a whole recipe",
        )
    config = _read(path)
    if "train" in config and Path(model_zoo.__file__).parent in file.parents:
        config.train.device = "auto"  # the zoo says CUDA, but nobody asked for it here
    return override(with_defaults(config, path), overrides)


def override(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """A recipe with overrides such as ``train.max_iter=100`` applied.

    Raises:
        InputError: an override names a key that does not exist, or cannot be read, or its value is of another type.
    """
    for text in overrides:
        _check_override(config, text)
    try:
        config = LazyConfig.apply_overrides(config, list(overrides))
    except Exception as error:  # hydra's parser and omegaconf each have their own
        raise InputError(
            " ".join(overrides), error, "overrides such as train.max_iter=100"
        ) from error
    check_train(config)
    return config


def _check_override(config: DictConfig, override: str) -> None:
    """Refuse a misspelt key: unknown ones are arguments only where a call takes them."""
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


def from_yacs(config: DictConfig) -> nn.Module:
    """Build the detector of a yacs config that was written out as a plain mapping, on the CPU."""
    cfg = get_cfg()
    add_d2kd_config(cfg)
    cfg.merge_from_other_cfg(CfgNode(OmegaConf.to_container(config, resolve=True)))
    cfg.MODEL.DEVICE = "cpu"
    return META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)


def detector(path: str) -> DictConfig:
    """The model node of a zoo name, a LazyConfig or a yacs YAML, to use as student or as teacher.

    A recipe whose model is a :class:`Distiller` gives its student. Pixel statistics and channel order are
    the node's own: a yacs config travels in it whole.

    Raises:
        InputError: there is no such config, or it does not load or holds no model.
    """
    file = _find(path)
    if _is_yacs(file):
        cfg = get_cfg()
        add_d2kd_config(cfg)
        try:
            cfg.merge_from_file(str(file))
        except Exception as error:  # YAML's errors, yacs's KeyErrors and assertions
            raise InputError(
                path, f"does not load ({error})", "a Detectron2 yacs config"
            ) from error
        return L(from_yacs)(config=yaml.safe_load(cfg.dump()))
    return student_of(_read(path).model)


def recipe_of(path: str) -> DictConfig | None:
    """The LazyConfig of a file with more than a model in it; None for a yacs config or a model alone.

    Raises:
        InputError: there is no such config, or it does not load or holds no model.
    """
    if _is_yacs(_find(path)):
        return None
    config = _read(path)
    return config if "dataloader" in config else None


def test_mapper(config: str | DictConfig) -> DictConfig | None:
    """The node of what reads a detector's test images.

    Args:
        config: a recipe, whose ``dataloader.test.mapper`` it is, or the path of a yacs config, whose ``INPUT``
            says it.

    Returns:
        None where neither tells.
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
