"""What a node of a recipe builds, and copies of it that are built with less."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from omegaconf import DictConfig, ListConfig, OmegaConf

from ..data import TwoScales
from ..modeling import Distiller, TorchvisionBackbone


def builds(node: DictConfig, kind: type) -> bool:
    """Whether a node builds an object of this very class; a saved recipe names it."""
    target = node.get("_target_")
    return target is kind or (isinstance(target, str) and target.endswith(f".{kind.__name__}"))


def is_distiller(model: DictConfig) -> bool:
    """Whether a model node builds a :class:`Distiller`."""
    return builds(model, Distiller)


def student_of(model: DictConfig) -> DictConfig:
    """The detector inside a model node: a Distiller's student, or the node itself."""
    return model.student if is_distiller(model) else model


def teacher_of(model: DictConfig) -> DictConfig:
    """The node of a Distiller's :class:`Teacher`, as it is built: all it is to know is in its own weights, if it has any."""
    teacher = copy.deepcopy(model.teacher)
    if teacher.get("weights"):
        teacher.detector = without_weights(teacher.detector)
    return teacher


def reading_mapper(mapper: DictConfig | None) -> DictConfig:
    """The node of the mapper that reads the file, which a :class:`TwoScales` holds; an empty one for None."""
    while mapper is not None and builds(mapper, TwoScales):
        mapper = mapper.mapper
    return OmegaConf.create() if mapper is None else mapper


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
