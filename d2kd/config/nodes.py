"""Inspect the nodes of a recipe, and copy them without weights or priors."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from omegaconf import DictConfig, ListConfig, OmegaConf

from ..data import DownscaledStudentMapper
from ..modeling import Distiller, TimmBackbone, TorchvisionBackbone


def has_target(node: DictConfig, kind: type) -> bool:
    """Return whether a node's ``_target_`` is this class. In a saved recipe, ``_target_`` is a string."""
    target = node.get("_target_")
    return target is kind or (isinstance(target, str) and target.endswith(f".{kind.__name__}"))


def is_distiller(model: DictConfig) -> bool:
    """Return whether the target of a model node is :class:`Distiller`."""
    return has_target(model, Distiller)


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
