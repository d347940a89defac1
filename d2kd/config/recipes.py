"""Whole recipes in a few lines: a detector beside its teacher, or one step of learning classes a few at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import NamedTuple

from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from ..data import TwoScales, class_step, split_classes
from ..data.incremental import Split
from ..losses import DistillLosses, ImitationLoss, TARLoss
from ..modeling import GFL, Distiller, Teacher
from ..structures.class_map import class_names
from ..utils.errors import InputError
from .files import detector, get_config, load
from .nodes import builds, reading_mapper, student_of

METHODS: dict[str, Callable[[], dict[str, DictConfig]]] = {
    "tar": lambda: {"losses": L(DistillLosses)(tar=L(TARLoss)())},
    "imitation": lambda: {"losses": L(DistillLosses)(imitation=L(ImitationLoss)())},
    "icd": lambda: dict(get_config("common/icd.py")),
}
"""What ``--distill NAME`` means: what :func:`distill` is given for a method at its defaults."""


def method(name: str) -> dict[str, DictConfig]:
    """A method at its defaults, by name: ``distill(…, **method("icd"))``.

    Returns:
        ``losses`` and, where these are trained by an optimizer of their own, ``loss_optimizer``.

    Raises:
        InputError: there is no such method.
    """
    if name not in METHODS:
        raise InputError("--distill", name, " or ".join(METHODS))
    return METHODS[name]()


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
    loss_optimizer: DictConfig | None = None,
    inherit: Iterable[str] = (),
    share: str = "student",
    scale: int = 1,
) -> Recipe:
    """A plain recipe with its model put beside a teacher.

    Args:
        base: the student's own recipe, by path or name or loaded.
        teacher: a ``Teacher`` node, or its config and weights as for :func:`detector`.
        losses: a ``DistillLosses`` node.
        loss_optimizer: ``optimizer``, ``lr_multiplier`` and ``clip_gradients`` of the parameters that the losses
            own, such as those of ``common/icd.py``; the recipe has them as ``train.loss_optimizer``. None: they
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
    if loss_optimizer is not None:
        base.train.loss_optimizer = loss_optimizer
    return Recipe(model, base.dataloader, base.optimizer, base.lr_multiplier, base.train)


def reduced(recipe: DictConfig, scale: int) -> DictConfig:
    """A recipe whose detector gets its images ``scale`` times smaller, beside the full ones for a teacher.

    Its mappers of training and test data are put into :class:`d2kd.data.TwoScales`; ``recipe`` is left as it was.
    """
    recipe = copy.deepcopy(recipe)
    for loader in (recipe.dataloader.train, recipe.dataloader.test):
        _resolve(loader.mapper)  # what it takes from elsewhere is found no more from inside
    for loader in (recipe.dataloader.train, recipe.dataloader.test):
        loader.mapper = L(TwoScales)(mapper=loader.mapper, scale=scale)
    return recipe


def _resolve(config: DictConfig | ListConfig) -> None:
    """Put the values of all interpolations in their place, at any depth."""
    for key in config if isinstance(config, DictConfig) else range(len(config)):
        if OmegaConf.is_interpolation(config, key):
            config[key] = copy.deepcopy(config[key])
        if not OmegaConf.is_missing(config, key) and OmegaConf.is_config(config[key]):
            _resolve(config[key])


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
    if "num_classes" not in model or not builds(model, GFL):
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
