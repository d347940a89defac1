"""Inspect the nodes of a recipe, and copy them without weights or priors."""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf

from ..data import DownscaledStudentMapper
from ..modeling import Distiller, TimmBackbone, TorchvisionBackbone
from ..utils.errors import InputError


class Recipe(NamedTuple):
    """The nodes of a training recipe, in the order in which configs unpack them.

    It is accepted wherever a recipe is. Of one that d2kd makes, each node resolves its references to the others, so
    that ``instantiate(recipe.model)`` builds the model.
    """

    model: DictConfig
    dataloader: DictConfig
    optimizer: DictConfig
    lr_multiplier: DictConfig
    train: DictConfig

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Recipe:
        """Make a recipe of copies of a config's nodes."""
        nodes = {name: config[name] for name in cls._fields}
        whole = DictConfig(nodes, flags={"allow_objects": True})
        return cls(*whole.values())


def as_config(recipe: Any) -> DictConfig:
    """Return a recipe as a config: a mapping or a :class:`~d2kd.config.Recipe`; a config itself is not copied."""
    if OmegaConf.is_list(recipe) and len(recipe) == len(Recipe._fields):  # OmegaConf's copy of one
        recipe = Recipe(*recipe)
    if OmegaConf.is_config(recipe):
        return recipe
    parts = recipe._asdict() if hasattr(recipe, "_asdict") else dict(recipe)
    return DictConfig(parts, flags={"allow_objects": True})


def has_target(node: DictConfig, kind: type) -> bool:
    """Return whether a node's ``_target_`` is this class. In a saved recipe, ``_target_`` is a string."""
    target = node.get("_target_")
    return target is kind or (isinstance(target, str) and target.endswith(f".{kind.__name__}"))


def is_distiller(model: DictConfig) -> bool:
    """Return whether the target of a model node is :class:`Distiller`."""
    return has_target(model, Distiller)


def check_arguments(config: DictConfig) -> None:
    """Check that each node's ``_target_`` takes its arguments; targets that cannot be inspected are left out.

    Raises:
        InputError: if it does not; the message has the key, and the nearest argument.
    """
    for node in _mappings(config):
        if "_target_" not in node:
            continue
        try:
            target = node["_target_"]
            target = locate(target) if isinstance(target, str) else target
            parameters = inspect.signature(target).parameters.values()
        except Exception:  # an import may raise anything; instantiate() says what is wrong
            continue
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            continue
        known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        for name in node:
            if name != "_target_" and name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                expected = near[0] if near else f"one of {', '.join(known) or 'none'}"
                found = f"no such argument of {target.__name__}"
                raise InputError(node._get_full_key(name), found, expected)


def student_node(model: DictConfig) -> DictConfig:
    """Return the detector's node: a Distiller's ``student``, otherwise the model node itself."""
    return model.student if is_distiller(model) else model


def teacher_node(model: DictConfig) -> DictConfig:
    """Copy a Distiller's :class:`Teacher` node. If it has weights, no classifier weights are downloaded first."""
    teacher = copy.deepcopy(model.teacher)
    if teacher.get("weights"):
        teacher.detector = without_weights(teacher.detector)
    return teacher


def base_mapper(mapper: DictConfig | None) -> DictConfig:
    """Return the mapper node that reads the image file, unwrapped from any :class:`DownscaledStudentMapper`; empty for None."""
    while mapper is not None and has_target(mapper, DownscaledStudentMapper):
        mapper = mapper.mapper
    return OmegaConf.create() if mapper is None else mapper


def without_priors(losses: DictConfig) -> DictConfig:
    """Set every ``priors`` of a losses node to None in place, so that building it reads no data set."""
    for loss in losses.values():
        if OmegaConf.is_dict(loss) and "priors" in loss:
            loss.priors = None
    return losses


def without_weights(model: DictConfig) -> DictConfig:
    """Copy a model node without pretrained backbone weights, for a model that loads a whole checkpoint."""
    model = copy.deepcopy(model)
    for node in _mappings(model):
        if has_target(node, TorchvisionBackbone):
            node.weights = None
        if has_target(node, TimmBackbone):
            node.pretrained, node.checkpoint_path = False, None
        if "TORCHVISION" in node:  # of a yacs config
            node.TORCHVISION.WEIGHTS = ""
        if "TIMM" in node:
            node.TIMM.PRETRAINED, node.TIMM.CHECKPOINT_PATH = False, ""
    return model


def _mappings(node: DictConfig | ListConfig) -> Iterator[DictConfig]:
    """Iterate over all mappings in a node, itself included, without following interpolations."""
    if OmegaConf.is_dict(node):
        yield node
    for key in range(len(node)) if OmegaConf.is_list(node) else list(node):
        if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            continue
        if OmegaConf.is_config(node[key]):
            yield from _mappings(node[key])
