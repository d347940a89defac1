"""Configs by name, detectors out of any of Detectron2's config kinds, and whole recipes in a few lines."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.config import LazyCall as L
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.modeling import META_ARCH_REGISTRY
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from .classes import class_names
from .data import TwoScales, class_step, split_classes
from .data.steps import Split
from .errors import InputError
from .losses import DistillLosses, ImitationLoss, TARLoss
from .modeling import (
    GFL,
    Distiller,
    Teacher,
    TorchvisionBackbone,
    add_distiller_config,
    add_gfl_config,
    add_torchvision_config,
)

METHODS: dict[str, Callable[[], dict[str, DictConfig]]] = {
    "tar": lambda: {"losses": L(DistillLosses)(tar=L(TARLoss)())},
    "imitation": lambda: {"losses": L(DistillLosses)(imitation=L(ImitationLoss)())},
    "icd": lambda: dict(get_config("common/icd.py")),
}
"""What ``--distill NAME`` means: what :func:`distill` is given for a method at its defaults."""


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
    package = Path(__file__).parent
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
    try:
        config = LazyConfig.load(str(_find(path)))
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

    It may be a Python file or the ``config.yaml`` of an earlier run. Missing keys of ``train`` take their values from
    ``common/train.py``.

    Raises:
        InputError: the file is missing, is no LazyConfig, or fails to load; an override names a key that
            does not exist.
    """
    file = _find(path)
    if _is_yacs(file):
        raise InputError(
            path,
            "a yacs config",
            "a LazyConfig (.py); a YAML can be a detector, not a whole recipe",
        )
    config = _read(path)
    missing = [key for key in ("dataloader", "optimizer", "train") if key not in config]
    if missing:
        raise InputError(path, f"defines no {', '.join(missing)}", "a whole training recipe")
    if Path(model_zoo.__file__).parent in file.parents:
        config.train.device = "auto"  # the zoo says CUDA, but nobody asked for it here
    config.train = OmegaConf.merge(get_config("common/train.py").train, config.train)
    return override(config, overrides)


def override(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """A recipe with overrides such as ``train.max_iter=100`` applied.

    Raises:
        InputError: an override names a key that does not exist, or cannot be read.
    """
    for text in overrides:
        _check_override(config, text)
    try:
        return LazyConfig.apply_overrides(config, list(overrides))
    except Exception as error:  # hydra's parser and omegaconf each have their own
        raise InputError(
            " ".join(overrides), error, "overrides such as train.max_iter=100"
        ) from error


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


def reading_mapper(mapper: DictConfig | None) -> DictConfig:
    """The node of the mapper that reads the file, which a :class:`TwoScales` holds; an empty one for None."""
    while mapper is not None and builds(mapper, TwoScales):
        mapper = mapper.mapper
    return OmegaConf.create() if mapper is None else mapper


def student_of(model: DictConfig) -> DictConfig:
    """The detector inside a model node: a Distiller's student, or the node itself."""
    return model.student if is_distiller(model) else model


def is_distiller(model: DictConfig) -> bool:
    """Whether a model node builds a :class:`Distiller`."""
    return builds(model, Distiller)


def builds(node: DictConfig, kind: type) -> bool:
    """Whether a node builds an object of this very class; a saved recipe names it."""
    target = node.get("_target_")
    return target is kind or (isinstance(target, str) and target.endswith(f".{kind.__name__}"))


def method(name: str) -> dict[str, DictConfig]:
    """A method at its defaults, by name: ``distill(…, **method("icd"))``.

    Returns:
        ``losses`` and, where these are trained by an optimizer of their own, ``distiller``.

    Raises:
        InputError: there is no such method.
    """
    if name not in METHODS:
        raise InputError("--distill", name, " or ".join(METHODS))
    return METHODS[name]()


def without_priors(losses: DictConfig) -> DictConfig:
    """The losses node, changed so that none wants a data set to estimate its priors from."""
    for loss in losses.values():
        if OmegaConf.is_dict(loss) and "priors" in loss:
            loss.priors = None
    return losses


def without_weights(model: DictConfig) -> DictConfig:
    """A copy of a model node that fetches no classifier's weights while it is built: a checkpoint brings all."""
    model = copy.deepcopy(model)
    for node in _mappings(model):
        if builds(node, TorchvisionBackbone):
            node.weights = None
        if "TORCHVISION" in node:  # of a yacs config
            node.TORCHVISION.WEIGHTS = ""
    return model


def _mappings(node: DictConfig | ListConfig) -> Iterator[DictConfig]:
    """Every mapping in a node, itself included; what is taken from elsewhere aside."""
    if OmegaConf.is_dict(node):
        yield node
    for key in range(len(node)) if OmegaConf.is_list(node) else list(node):
        if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            continue
        if OmegaConf.is_config(node[key]):
            yield from _mappings(node[key])


def teacher_of(model: DictConfig) -> DictConfig:
    """The node of a Distiller's :class:`Teacher`, as it is built: all it is to know is in its own weights, if it has any."""
    teacher = copy.deepcopy(model.teacher)
    if teacher.get("weights"):
        teacher.detector = without_weights(teacher.detector)
    return teacher


class Recipe(NamedTuple):
    """The nodes of a training recipe, in the order in which a config unpacks them."""

    model: DictConfig
    dataloader: DictConfig
    optimizer: DictConfig
    lr_multiplier: DictConfig
    train: DictConfig


def distill(
    base: str | DictConfig,
    *,
    teacher: DictConfig | tuple[str, str],
    losses: DictConfig,
    distiller: DictConfig | None = None,
    inherit: Iterable[str] = (),
    share: str = "student",
    scale: int = 1,
) -> Recipe:
    """A plain recipe with its model put beside a teacher.

    Args:
        base: the student's own recipe, by path or name or loaded.
        teacher: a ``Teacher`` node, or its config and weights as for :func:`detector`.
        losses: a ``DistillLosses`` node.
        distiller: ``optimizer``, ``lr_multiplier`` and ``clip_gradients`` of the parameters that the losses
            own, such as those of ``common/icd.py``; the recipe has them as ``train.distiller``. None: they
            are trained as the student's.
        inherit, share: see :class:`Distiller`.
        scale: of a teacher whose images are the recipe's, while the student's are reduced that many times, see
            :func:`reduced`.

    Returns:
        the whole recipe; ``base`` is left as it was. A config writes
        ``model, dataloader, optimizer, lr_multiplier, train = distill(…)``.
    """
    base = load(base) if isinstance(base, str) else copy.deepcopy(base)
    if not isinstance(teacher, DictConfig):
        config, weights = teacher
        teacher = L(Teacher)(detector=detector(config), weights=weights)
    if "image_format" not in teacher:
        mapper = reading_mapper(base.dataloader.train.get("mapper"))
        teacher.image_format = mapper.get("image_format", "BGR")
    if scale != 1:
        teacher.scale = scale
        base = reduced(base, scale)
    model = L(Distiller)(
        student=student_of(base.model),
        teacher=teacher,
        losses=losses,
        max_iter="${train.max_iter}",
        inherit=list(inherit),
        share=share,
    )
    if teacher.get("classes") is not None:
        # Where the student's classes are those of its data.
        model.classes = "${dataloader.train.dataset.names}"
    if distiller is not None:
        base.train.distiller = distiller
    return Recipe(model, base.dataloader, base.optimizer, base.lr_multiplier, base.train)


def reduced(recipe: DictConfig, scale: int) -> DictConfig:
    """A recipe whose detector gets its images ``scale`` times smaller, beside the full ones for a teacher.

    Its mappers of training and test data are put into :class:`d2kd.data.TwoScales`; ``recipe`` is left as it was.
    """
    recipe = copy.deepcopy(recipe)
    for loader in (recipe.dataloader.train, recipe.dataloader.test):
        mapper = loader.mapper
        for key in mapper:  # what it takes from elsewhere is found no more from inside
            if OmegaConf.is_interpolation(mapper, key):
                mapper[key] = mapper[key]
    for loader in (recipe.dataloader.train, recipe.dataloader.test):
        loader.mapper = L(TwoScales)(mapper=loader.mapper, scale=scale)
    return recipe


def increment(
    base: str | DictConfig,
    *,
    split: Split,
    step: int,
    weights: str = "",
    losses: DictConfig | None = None,
) -> Recipe:
    """A plain recipe of all classes as one step of learning them a few at a time.

    Its data become a class step of its data. From step 2 on its detector has the old classes and the new ones,
    starts as the detector of the step before, which is also its teacher, and its own losses see new classes
    alone. The classes of both are named, so that another step's weights are refused.

    Args:
        base: the recipe, by path or name or loaded; its model is a GFL.
        split: the classes of each step, see :func:`d2kd.data.split_classes`.
        step: from 1.
        weights: of the step before.
        losses: a ``DistillLosses`` node; None: none, which is fine-tuning.

    Returns:
        the whole recipe; ``base`` is left as it was.

    Raises:
        InputError: the split does not fit the data's classes, the data are several sets, or the detector is no GFL.
    """
    base = load(base) if isinstance(base, str) else copy.deepcopy(base)
    model, data = student_of(base.model), base.dataloader
    if "num_classes" not in model or model.get("_target_") not in (GFL, f"{GFL.__module__}.GFL"):
        raise InputError("increment", "a recipe of another detector", "one of a GFL")
    for part in ("train", "test"):
        names = data[part].dataset.names
        if OmegaConf.is_list(names):
            if len(names) != 1:
                key = f"dataloader.{part}.dataset.names"
                raise InputError(key, f"{len(names)} data sets", "one alone")
            data[part].dataset.names = names[0]
    names = data.train.dataset.names
    if OmegaConf.is_dict(names):  # what registers the data may tell its classes without them
        names = list(names.get("classes") or class_names(instantiate(names)))
    steps = split_classes(names, split)
    if not 1 <= step <= len(steps):
        raise InputError("step", step, f"from 1 to {len(steps)}")
    if not isinstance(split, str):
        split = [list(classes) for classes in split]
    for part, seen in ((data.train, False), (data.test, True)):
        part.dataset.names = L(class_step)(
            dataset=part.dataset.names, split=split, step=step, seen=seen
        )
    learned = [name for classes in steps[:step] for name in classes]
    model.num_classes = len(learned)
    if step == 1:
        return Recipe(model, data, base.optimizer, base.lr_multiplier, base.train)
    old = copy.deepcopy(model)
    model.num_old_classes = old.num_classes = len(learned) - len(steps[step - 1])
    base.model, base.train.init_checkpoint = model, ""
    recipe = distill(
        base,
        teacher=L(Teacher)(detector=old, weights=weights, classes=learned[: model.num_old_classes]),
        losses=losses or L(DistillLosses)(),
        inherit=[""],  # all of it, the classifier by class
    )
    recipe.model.classes = learned
    return recipe
