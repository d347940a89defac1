"""Inspect the nodes of a recipe, and copy them without weights or priors."""

from __future__ import annotations

import contextlib
import copy
import difflib
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from detectron2.config import instantiate
from detectron2.data import build_detection_train_loader
from detectron2.data import transforms as T
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..data import DownscaledStudentMapper, build_train_loader
from ..modeling import Distiller, FeatureExtractor, TimmBackbone, TorchvisionBackbone
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


def build_part(key: str, node: Any) -> Any:
    """Build a node of a recipe, as Detectron2's ``instantiate`` does.

    Args:
        key: the node's key, for the error.
        node: the node; any other value is returned as it is.

    Raises:
        InputError: its target raises an error, or it is a mapping without one.
    """
    if OmegaConf.is_dict(node) and "_target_" not in node:
        raise InputError(key, "a mapping without _target_", "a node such as L(FUNCTION)(…)")
    try:
        return instantiate(node)
    except InputError:
        raise
    except Exception as error:  # any that a target may raise
        found = f"cannot be built ({type(error).__name__}: {error})"
        expected = "values that its _target_ takes; --debug shows the traceback"
        raise InputError(key, found, expected) from error


def has_target(node: DictConfig, kind: type) -> bool:
    """Return whether a node's ``_target_`` is this class. In a saved recipe, ``_target_`` is a string."""
    if not OmegaConf.is_dict(node):  # a function or an object: Detectron2 takes them, too
        return False
    target = node.get("_target_")
    return target is kind or (isinstance(target, str) and target.endswith(f".{kind.__name__}"))


def is_distiller(model: DictConfig) -> bool:
    """Return whether the target of a model node is :class:`Distiller`."""
    return has_target(model, Distiller)


def is_feature_extractor(teacher: DictConfig) -> bool:
    """Return whether the detector of a :class:`Teacher` node is a :class:`FeatureExtractor`, which detects nothing."""
    return has_target(teacher.get("detector"), FeatureExtractor)


def check_arguments(config: DictConfig) -> None:
    """Check that each node's ``_target_`` takes its arguments; targets that cannot be inspected are left out.

    Raises:
        InputError: if it does not; the message has the key, and the nearest argument. Or an argument is text or null,
            and the target's annotation says that it is a number.
    """
    for node in _mappings(config):
        if "_target_" not in node:
            continue
        try:
            target = node["_target_"]
            target = locate(target) if isinstance(target, str) else target
            parameters = list(inspect.signature(target).parameters.values())
        except Exception:  # an import may raise anything; instantiate() says what is wrong
            continue
        if target is build_detection_train_loader:  # d2kd's takes its place
            parameters += inspect.signature(build_train_loader).parameters.values()
        for parameter in parameters:
            _check_number(node, parameter)
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            continue
        known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        for name in node:
            if name != "_target_" and name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                expected = near[0] if near else f"one of {', '.join(known) or 'none'}"
                found = f"no such argument of {target.__name__}"
                raise InputError(node._get_full_key(name), found, expected)


def find_parameter(config: DictConfig, key: str) -> inspect.Parameter | None:
    """Return the parameter of a node's ``_target_`` for a dotted key; None if it cannot be found."""
    parent, _, name = key.rpartition(".")
    with contextlib.suppress(Exception):  # an import may raise anything
        node = OmegaConf.select(config, parent)
        target = node["_target_"]
        target = locate(target) if isinstance(target, str) else target
        return inspect.signature(target).parameters[name]
    return None


_OPTIONAL = {"None", "NoneType", "Optional", "typing.Optional"}
_NUMBERS = {"int", "float", "torch.Tensor", "Tensor", *_OPTIONAL}
"""Words of the annotation of a number."""


def _annotation_words(parameter: inspect.Parameter) -> set[str]:
    kind = parameter.annotation
    return set(re.findall(r"[\w.]+", kind.__name__ if isinstance(kind, type) else str(kind)))


def refuses_null(parameter: inspect.Parameter | None) -> bool:
    """Return whether the annotation of a parameter says that it is never None."""
    if parameter is None or parameter.annotation is parameter.empty or parameter.default is None:
        return False
    return not _annotation_words(parameter) & (_OPTIONAL | {"Any", "typing.Any"})


def _check_number(node: DictConfig, parameter: inspect.Parameter) -> None:
    """Raise InputError for text or null as an argument that is annotated as a number."""
    name = parameter.name
    words = set() if name not in node else _annotation_words(parameter)
    if not words & {"int", "float"} or not words <= _NUMBERS or OmegaConf.is_missing(node, name):
        return
    try:
        value = node[name]
    except OmegaConfBaseException:  # an interpolation without a target
        return
    if isinstance(value, str) or (value is None and refuses_null(parameter)):
        found = "null" if value is None else repr(value)
        raise InputError(node._get_full_key(name), found, "a number")


def student_node(model: DictConfig) -> DictConfig:
    """Return the detector's node: a Distiller's ``student``, otherwise the model node itself."""
    return model.student if is_distiller(model) else model


def teacher_node(model: DictConfig) -> DictConfig:
    """Copy a Distiller's :class:`Teacher` node. If it has weights, no classifier weights are downloaded first."""
    teacher = copy.deepcopy(model.teacher)
    if teacher.get("weights"):
        teacher.detector = without_weights(teacher.detector)
    return teacher


def full_size_mapper(mapper: Any) -> tuple[Any, float] | None:
    """Return the mapper inside a :class:`DownscaledStudentMapper`, a node or an object, and its scale; else None."""
    if has_target(mapper, DownscaledStudentMapper) or isinstance(mapper, DownscaledStudentMapper):
        return mapper.mapper, mapper.scale
    return None


def base_mapper(mapper: Any) -> DictConfig:
    """Return the mapper node that reads the image file, unwrapped from any :class:`DownscaledStudentMapper`.

    Of an object such as Detectron2's ``DatasetMapper``, what it says of itself is returned as a node: ``image_format``
    and ``augmentations``. The node is empty for None, and for a function, whose channel order is unknown.
    """
    while inner := full_size_mapper(mapper):
        mapper, _ = inner
    if OmegaConf.is_dict(mapper):
        return mapper
    node = DictConfig({}, flags={"allow_objects": True})
    if isinstance(order := getattr(mapper, "image_format", None), str):
        node.image_format = order
    if isinstance(augmentations := getattr(mapper, "augmentations", None), T.AugmentationList):
        node.augmentations = list(augmentations.augs)
    return node


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
