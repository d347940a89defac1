"""The keys of a recipe's ``train``, with types, defaults and meanings: Detectron2's wherever it has the key.

``train`` is checked against :class:`Train` when a recipe is loaded, after overrides, and when a trainer is built, so
that a misspelt key or a value of the wrong type is a one-line error.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import inspect
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, get_origin, get_type_hints

from detectron2.utils.registry import locate
from fvcore.common.param_scheduler import ParamScheduler
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..utils.errors import InputError
from .nodes import as_config, check_arguments, is_distiller

logger = logging.getLogger(__name__)


def _at_least(least: int, default: int) -> Any:
    return field(default=default, metadata={"least": least})


def _positive(default: float) -> Any:
    return field(default=default, metadata={"positive": True})


def _one_of(*choices: str) -> Any:
    """A string out of several; the first is the default."""
    return field(default=choices[0], metadata={"choices": choices})


@dataclass
class AMP:
    """``train.amp``: mixed precision. Only bfloat16 works on a CPU."""

    enabled: bool = False
    dtype: str = _one_of("float16", "bfloat16")


@dataclass
class ClipGradients:
    """``clip_gradients``: "full_model" clips the norm of all gradients, "norm" each parameter's, "value" entries."""

    enabled: bool = False
    clip_type: str = _one_of("full_model", "norm", "value")
    clip_value: float = _positive(1.0)
    norm_type: float = _positive(2.0)


@dataclass
class EMA:
    """``train.ema``: an average of the student's weights, see :class:`d2kd.engine.ema.EMA`.

    It is evaluated instead of the student, and is the "model" of checkpoints; what is trained is beside it.
    """

    enabled: bool = False
    decay: float = field(default=0.9998, metadata={"positive": True, "below": 1})


@dataclass
class DDP:
    """``train.ddp``: arguments of ``DistributedDataParallel``, and whether gradients are sent as float16."""

    broadcast_buffers: bool = False
    find_unused_parameters: bool = False
    fp16_compression: bool = False


@dataclass
class Checkpointer:
    """``train.checkpointer``: iterations between checkpoints, and how many of them are kept (null: all)."""

    period: int = _at_least(1, 5000)
    max_to_keep: int | None = _at_least(1, 100)


@dataclass
class LossOptimizer:
    """``train.loss_optimizer``: a separate optimizer for the parameters of ``model.losses``."""

    optimizer: Any = MISSING
    lr_multiplier: Any = None
    clip_gradients: ClipGradients = field(default_factory=ClipGradients)


@dataclass
class Train:
    """``train``.

    Attributes:
        output_dir: folder of the run; "~" at its start is the home folder.
        init_checkpoint: initial weights of the student; those that match by name and shape are loaded.
        max_iter: number of iterations.
        reference_batch_size: the number of images for which the recipe's learning rates and ``max_iter`` are meant; 0
            or null: as many as ``dataloader.train.total_batch_size``. If they differ, the trainer adapts the recipe by
            :func:`scale_to_batch_size`.
        seed: for weights, batches and sampling, below 2**31; null or negative: a random seed.
        device: "cpu" or "cuda"; "auto": CUDA if available.
        accumulate: number of parts of a process's images, whose gradients are added up for a step, so that only one part
            at a time needs memory. ``total_batch_size`` stays that of a step.
        sync_batchnorm: whether the student's batch norms have the statistics of all processes.
        best_checkpoint: metric by which ``model_best.pth`` is chosen; "": no such file.
        eval_period: iterations between evaluations; 0: only at the end.
        eval_teacher: whether to evaluate the teacher before the first iteration.
        draw_period: iterations between pictures of detections in TensorBoard; 0: none.
        draw_images: number of pictures, of the first test images.
        log_period: iterations between lines of the log.
        loss_optimizer: by default, the student's optimizer trains the parameters of the losses.
        user: any keys, for custom hooks.
    """

    output_dir: str = "./output"
    init_checkpoint: str | None = ""
    max_iter: int = field(default=90000, metadata={"least": 1, "below": 2**31})
    reference_batch_size: int | None = _at_least(0, 0)
    seed: int | None = field(default=0, metadata={"below": 2**31})
    device: str = "auto"
    amp: AMP = field(default_factory=AMP)
    clip_gradients: ClipGradients = field(default_factory=ClipGradients)
    accumulate: int = _at_least(1, 1)
    ema: EMA = field(default_factory=EMA)
    sync_batchnorm: bool = False
    ddp: DDP = field(default_factory=DDP)
    checkpointer: Checkpointer = field(default_factory=Checkpointer)
    best_checkpoint: str | None = "bbox/AP"
    eval_period: int = _at_least(0, 5000)
    eval_teacher: bool = True
    draw_period: int = _at_least(0, 0)
    draw_images: int = _at_least(1, 4)
    log_period: int = _at_least(1, 20)
    cudnn_benchmark: bool = False
    loss_optimizer: LossOptimizer | None = None
    user: dict[str, Any] = field(default_factory=dict)


_EXPECTED = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    dict: "a mapping",
}


def train_field_type(key: str) -> Any:
    """Return the type of a dotted key of ``train``, of ``T | None`` T; None for any other key."""
    first, *parts = key.split(".")
    kind: Any = Train if first == "train" and parts else None
    for part in parts:
        kind = _types(kind).get(part) if dataclasses.is_dataclass(kind) else None
    return kind


def train_defaults() -> dict[str, Any]:
    """Return a plain dict of all keys and their defaults."""
    return OmegaConf.to_container(OmegaConf.structured(Train))


def with_defaults(cfg: Any, culprit: str = "the recipe") -> DictConfig:
    """Copy a recipe, check its ``train`` and add the missing keys of :class:`Train`.

    Args:
        cfg: a config, a mapping, or a :class:`~d2kd.config.Recipe`.
        culprit: name of the recipe in an error.

    Raises:
        InputError: if a part of the recipe is missing, ``train`` has an unknown key or an invalid value, or a node has
            an argument that its ``_target_`` does not take.
    """
    cfg = as_config(cfg)
    missing = [key for key in ("model", "dataloader", "optimizer", "train") if key not in cfg]
    if not missing and not OmegaConf.is_dict(cfg.dataloader):
        raise InputError("dataloader", _describe(cfg.dataloader), "a mapping with train")
    if missing or "train" not in cfg.dataloader:
        found = f"no {', '.join(missing or ['dataloader.train'])}"
        raise InputError(culprit, found, "model, dataloader.train, optimizer and train")
    _check_parts(cfg)
    config = copy.deepcopy(cfg)
    check_train(config)
    check_arguments(config)
    nodes, own = {"optimizer": config.optimizer}, config.train.loss_optimizer
    if own is not None:
        if not is_distiller(config.model):
            raise InputError("train.loss_optimizer", "no Distiller in the recipe", "null")
        if OmegaConf.is_missing(own, "optimizer"):
            expected = "optimizer, and maybe lr_multiplier and clip_gradients"
            raise InputError("train.loss_optimizer", "no optimizer", expected)
        nodes["train.loss_optimizer.optimizer"] = own.optimizer
    for key, node in nodes.items():
        if not OmegaConf.is_dict(node):
            raise InputError(key, node, "a node such as L(torch.optim.SGD)(…)")
    return config


def _check_parts(config: DictConfig) -> None:
    """Check the parts of a recipe that Detectron2's training scripts build: nodes, or objects in their place.

    Raises:
        InputError: a part is neither a node nor of use as it is.
    """
    model, example = config.model, "GeneralizedRCNN"
    nodes = {"model": (model, example)}
    if is_distiller(model):
        examples = {"student": example, "teacher": "Teacher", "losses": "DistillLosses"}
        nodes |= {f"model.{k}": (model.get(k), example) for k, example in examples.items()}
        if OmegaConf.is_dict(model.teacher) and "detector" in model.teacher:
            nodes["model.teacher.detector"] = model.teacher.detector, example
    for key, (node, example) in nodes.items():
        if not OmegaConf.is_dict(node):
            raise InputError(key, _describe(node), f"a node such as L({example})(…)")
    multiplier = config.get("lr_multiplier")
    if not (multiplier is None or is_node(multiplier) or isinstance(multiplier, ParamScheduler)):
        expected = "a node such as L(LinearParamScheduler)(…)"
        raise InputError("lr_multiplier", _describe(multiplier), expected)
    for part in ("train", "test"):
        key, loader = f"dataloader.{part}", config.dataloader.get(part)
        if part == "test" and loader is None:
            continue
        if not is_node(loader):
            if OmegaConf.is_dict(loader):  # for a trainer that builds its own
                continue
            if OmegaConf.is_config(loader) or isinstance(loader, str) or not _is_iterable(loader):
                expected = (
                    f"a node such as L(build_{part}_loader)(…), or an object that yields batches"
                )
                raise InputError(key, _describe(loader), expected)
            continue
        mapper = loader.get("mapper")
        missing = "mapper" not in loader and _needs(loader, "mapper")
        if missing or ("mapper" in loader and not is_node(mapper) and not callable(mapper)):
            found = "none" if mapper is None else _describe(mapper)
            raise InputError(
                f"{key}.mapper", found, "a node such as L(DatasetMapper)(…), or a function"
            )
        dataset = loader.get("dataset")
        if OmegaConf.is_list(dataset) or (callable(dataset) and not hasattr(dataset, "__len__")):
            expected = "a node such as L(get_detection_dataset_dicts)(…) or L(FUNCTION)()"
            raise InputError(f"{key}.dataset", _describe(dataset), expected)
    evaluators = config.dataloader.get("evaluator")
    for one in evaluators if OmegaConf.is_list(evaluators) else [evaluators]:
        if is_node(one) or _is_evaluator(one) or one is evaluators is None:
            continue
        expected = "a node such as L(COCOEvaluator)(…), or a DatasetEvaluator"
        raise InputError("dataloader.evaluator", _describe(one), expected)


def is_node(value: Any) -> bool:
    """Return whether a value is a mapping that Detectron2's ``instantiate`` calls."""
    return OmegaConf.is_dict(value) and "_target_" in value


def _is_iterable(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, type)


def _is_evaluator(value: Any) -> bool:
    methods = ("reset", "process", "evaluate")
    return not isinstance(value, type) and all(hasattr(value, name) for name in methods)


def _needs(node: DictConfig, argument: str) -> bool:
    """Return whether the target of a node has an argument without a default."""
    with contextlib.suppress(
        Exception
    ):  # an import may raise anything; instantiate() says what is wrong
        target = node["_target_"]
        target = locate(target) if isinstance(target, str) else target
        return inspect.signature(target).parameters[argument].default is inspect.Parameter.empty
    return False


def _describe(value: Any) -> str:
    """Return a value's kind for a message."""
    if value is None:
        return "null"
    if OmegaConf.is_list(value):
        return f"a list of {len(value)}"
    if OmegaConf.is_dict(value):
        return "a mapping without _target_"
    if isinstance(value, type):
        return f"the class {value.__name__} itself"
    if inspect.isroutine(value):
        return f"the function {value.__name__}"
    if isinstance(value, str | int | float):
        return repr(value)
    return f"a {type(value).__name__}"


def check_train(config: DictConfig) -> None:
    """Check a config's ``train`` and add missing keys in place. It stays an untyped mapping.

    Raises:
        InputError: if it has an unknown key or an invalid value.
    """
    if not OmegaConf.is_dict(config.train):
        raise InputError("train", config.train, "a mapping")
    kinds = _types(Train)
    for key, value in OmegaConf.to_container(config.train).items():
        # OmegaConf would treat "???" as missing, and convert a bool to a string.
        if value == "???" or (isinstance(value, bool) and kinds.get(key) is str):
            raise InputError(f"train.{key}", value, _EXPECTED.get(kinds.get(key), "a value"))
    typed = OmegaConf.structured(Train, flags={"allow_objects": True})
    try:
        typed = OmegaConf.merge(typed, config.train)
    except OmegaConfBaseException:  # one by one, which is slow, to name the key
        for key in config.train:
            try:
                typed = OmegaConf.merge(typed, OmegaConf.masked_copy(config.train, [key]))
            except OmegaConfBaseException as error:
                raise _to_input_error(error, key, config.train) from None
    config.train = typed
    try:
        _check_values(config.train)
    except OmegaConfBaseException as error:  # an interpolation cannot be resolved
        raise _to_input_error(error, "", config.train) from None
    if not config.train.output_dir.strip():
        raise InputError("train.output_dir", "nothing", "a folder")
    config.train.output_dir = os.path.expanduser(config.train.output_dir)
    config.train = DictConfig(OmegaConf.to_container(config.train), flags={"allow_objects": True})


def scale_to_batch_size(config: DictConfig) -> None:
    """Adapt a recipe with defaults to its batch size, in place, if ``train.reference_batch_size`` is another.

    With n times the images per batch, learning rates, the losses' included, are multiplied by n, and ``max_iter`` and
    the periods of checkpoints, evaluations and pictures are divided by n, as by Detectron2's ``auto_scale_workers``.
    Schedules and warm-ups are fractions of ``max_iter`` and stretch with it. ``reference_batch_size`` then becomes the
    batch size, so that the result is not adapted again.

    Raises:
        InputError: the recipe has no ``dataloader.train.total_batch_size``, or an optimizer has no ``lr``.
    """
    train, reference = config.train, config.train.reference_batch_size
    if not reference:
        return
    node = config.dataloader.train
    size = node.get("total_batch_size") if OmegaConf.is_dict(node) else None
    if not size:
        found = f"{reference}, and no dataloader.train.total_batch_size"
        raise InputError("train.reference_batch_size", found, "0, or a loader with a batch size")
    train.reference_batch_size = size
    if size == reference:
        return
    scale = size / reference
    optimizers = {"optimizer": config.optimizer}
    if train.loss_optimizer is not None:
        optimizers["train.loss_optimizer.optimizer"] = train.loss_optimizer.optimizer
    values = []  # all are read before one is changed, because one may refer to another
    for name, optimizer in optimizers.items():
        if optimizer.get("lr") is None:
            raise InputError(f"{name}.lr", "none to scale", "a learning rate, or no reference size")
        values.append((optimizer, "lr", optimizer.lr * scale))
        groups = optimizer.get("params")
        if OmegaConf.is_dict(groups) and groups.get("base_lr") is not None:
            values.append((groups, "base_lr", groups.base_lr * scale))
    periods = [(train, "max_iter"), (train.checkpointer, "period")]
    periods += [(train, key) for key in ("eval_period", "draw_period") if train[key]]
    values += [(node, key, max(1, round(node[key] / scale))) for node, key in periods]
    for node, key, value in values:
        node[key] = value
    logger.info(
        "Adapted from %d to %d images per batch: %s, train.max_iter=%d, periods of %d (checkpoints) and %d (evaluations)",
        reference,
        size,
        ", ".join(f"{name}.lr={optimizer.lr:g}" for name, optimizer in optimizers.items()),
        train.max_iter,
        train.checkpointer.period,
        train.eval_period,
    )


def _to_input_error(error: OmegaConfBaseException, key: str, train: DictConfig) -> InputError:
    """Convert OmegaConf's error about a key of ``train`` to a one-line InputError."""
    full = (error.full_key or key).removeprefix("train.")
    kind: Any = Train
    for depth, part in enumerate(full.split(".")):
        fields = _types(kind)
        if part not in fields:
            close = difflib.get_close_matches(part, fields, n=1)
            known = close[0] if close else f"one of {', '.join(fields)}"
            if depth == 0:
                known += f"; a hook's own is train.user.{part}"
            return InputError(f"train.{full}", "no such key", known)
        kind = fields[part]
        if not dataclasses.is_dataclass(kind):
            break
    if dataclasses.is_dataclass(kind):
        expected = f"keys such as {', '.join(_types(kind))}"
    else:
        expected = _EXPECTED.get(get_origin(kind) or kind, "another value")
    try:
        found = OmegaConf.select(train, full)
    except OmegaConfBaseException:  # an interpolation without a target, or of the wrong type
        found = str(error).splitlines()[0]
    return InputError(f"train.{full}", found, expected)


def _types(kind: type) -> dict[str, Any]:
    """Return the type of each field; ``T`` for ``T | None``."""
    return {
        name: hint.__args__[0] if isinstance(hint, UnionType) else hint
        for name, hint in get_type_hints(kind).items()
    }


def _check_values(node: DictConfig, where: str = "train") -> None:
    """Raise InputError for a number out of range or a string that is not among the choices."""
    for one in dataclasses.fields(OmegaConf.get_type(node)):
        if OmegaConf.is_missing(node, one.name):
            continue
        value, rule = node[one.name], one.metadata
        if OmegaConf.is_dict(value) and dataclasses.is_dataclass(OmegaConf.get_type(value)):
            _check_values(value, f"{where}.{one.name}")
            continue
        if "least" in rule and value is not None and value < rule["least"]:
            expected = f"an integer, at least {rule['least']}"
            raise InputError(f"{where}.{one.name}", value, expected)
        if "positive" in rule and not value > 0:
            raise InputError(f"{where}.{one.name}", value, "a number above 0")
        if "below" in rule and value is not None and value >= rule["below"]:
            kind = "a number" if isinstance(value, float) else "an integer"
            raise InputError(f"{where}.{one.name}", value, f"{kind} below {rule['below']}")
        if "choices" in rule and value not in rule["choices"]:
            raise InputError(f"{where}.{one.name}", value, " or ".join(rule["choices"]))
