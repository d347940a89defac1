"""Checks of a recipe and its model that read no data, draw no random numbers and run no model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..config import base_mapper
from ..data import check_dataset
from ..data.datasets import dataset_names
from ..engine.checkpoint import get_student, unwrap_ddp
from ..layers.adapter import LevelStrides, match_levels
from ..modeling import Distiller
from ..modeling.inference_optimization import is_frozen_norm
from ..structures.class_map import class_names, num_classes_of
from ..utils.errors import InputError
from .findings import Finding, guarded

logger = logging.getLogger("d2kd.doctor")

IMAGENET_MEAN = {"RGB": [123.675, 116.28, 103.53], "BGR": [103.53, 116.28, 123.675]}

SGD_RATE = {True: 0.02, False: 0.01}
"""Detectron2's learning rates for SGD at 16 images per iteration: of two-stage (True) and dense detectors."""

REFERENCE_BATCH = 16
SGD_MULTIPLES = (1 / 20, 4, 12)
"""Multiples of these rates, scaled with the batch size (arXiv 1706.02677): below the first or above the second is a
warning, above the third an error."""

ADAM_RATES = (1e-5, 1e-2, 5e-2)
"""For Adam and AdamW at any batch size: below the first or above the second is a warning, above the third an error."""


def sanity_check(config: DictConfig, model: nn.Module, debug: bool = False) -> list[Finding]:
    """Check channel order, frozen norms, classes, levels and learning rate.

    Args:
        config: a complete recipe.
        model: its model, which may be wrapped in DDP.
        debug: whether to raise the error of a check that fails, instead of returning it as a finding.
    """
    model = unwrap_ddp(model)
    checks = {
        "channel order": _check_channels,
        "frozen norms": _check_frozen_norms,
        "classes": _check_classes,
        "levels": _check_levels,
        "learning rate": _check_learning_rate,
    }
    return [
        finding
        for subject, check in checks.items()
        for finding in guarded(subject, partial(check, config, model), debug=debug)
    ]


class SanityCheckHook(HookBase):
    """Logs the results of :func:`sanity_check` before training; warnings and errors as a warning."""

    def before_train(self) -> None:
        if not comm.is_main_process():
            return
        for finding in sanity_check(self.trainer.cfg, self.trainer.model):
            level = logging.INFO if finding.state == "ok" else logging.WARNING
            advice = f" -> {finding.advice}" if finding.advice else ""
            logger.log(level, "%s: %s%s", finding.subject, finding.found, advice)


def _check_channels(config: DictConfig, model: nn.Module) -> Iterator[Finding]:
    readers = [
        base_mapper(OmegaConf.select(config, f"dataloader.{part}.mapper", default=None))
        for part in ("train", "test")
    ]
    train, test = (reader.get("image_format") for reader in readers)
    train_key, test_key = (reader._get_full_key("image_format") for reader in readers)
    if train is None:
        yield Finding("channel order", "ok", "unknown: the mapper has no image_format")
        return
    if test is not None and test != train:
        found = f"training images are {train}, test images {test}"
        yield Finding("channel order", "error", found, f"{test_key}={train}")
    student = get_student(model)
    wanted = getattr(student, "input_format", None) or train
    if wanted != train:
        found = f"images are {train}, the student's input_format is {wanted}"
        yield Finding("channel order", "error", found, f"{train_key}={wanted}")
    yield _check_pixels("student", student, train, train_key)
    if not isinstance(model, Distiller):
        return
    declared = OmegaConf.select(config, "model.teacher.image_format", default="BGR")
    if declared != train:
        found = f"images are {train}, the teacher's image_format is {declared}"
        yield Finding("channel order", "error", found, f"model.teacher.image_format={train}")
        return
    seen = train[::-1] if model.teacher.flip_channels else train
    yield _check_pixels("teacher", model.teacher.detector, seen, "model.teacher.input_format")


def _check_pixels(who: str, detector: nn.Module, seen: str, key: str) -> Finding:
    """Check that a detector's pixel mean has the channel order of its inputs, and fits its weights."""
    mean, std = (x.flatten().tolist() for x in (detector.pixel_mean, detector.pixel_std))
    for order, known in IMAGENET_MEAN.items():
        if order != seen and _close(mean, known):
            found = f"the {who} sees {seen}, its pixel_mean is ImageNet's in {order}"
            return Finding("channel order", "error", found, f"{key}={order}, or turn its mean")
    bottom_up = getattr(detector.backbone, "bottom_up", detector.backbone)
    statistics = getattr(bottom_up, "pixel_statistics", None)
    if statistics and getattr(bottom_up, "pretrained", False):
        wanted_mean, wanted_std = statistics
        if seen != "RGB" or not (_close(mean, wanted_mean) and _close(std, wanted_std)):
            found = f"the {who} sees {seen}, its pretrained weights want RGB and other statistics"
            advice = f"{key}=RGB, and its input_format, pixel_mean={_numbers(wanted_mean)} and pixel_std={_numbers(wanted_std)}"
            return Finding("channel order", "warning", found, advice)
    return Finding(
        "channel order",
        "ok",
        f"the {who} sees {seen}, mean {', '.join(f'{value:.4g}' for value in mean)}",
    )


def _numbers(values: Sequence[float]) -> str:
    return f"[{','.join(f'{value:g}' for value in values)}]"


def _close(values: Sequence[float], known: Sequence[float]) -> bool:
    return all(abs(a - b) < 1 for a, b in zip(values, known, strict=True))


def _check_frozen_norms(config: DictConfig, model: nn.Module) -> Iterator[Finding]:
    """Warn of fixed norms as they are initialized: they fit pretrained weights only."""
    frozen = [m for m in get_student(model).modules() if is_frozen_norm(m)]
    if not frozen:
        return
    defaults = dict(weight=1.0, bias=0.0, running_mean=0.0, running_var=1.0)
    untouched = sum(
        all(((getattr(m, key) - value).abs() < 1e-3).all() for key, value in defaults.items())
        for m in frozen
    )
    if untouched == 0:
        yield Finding("frozen norms", "ok", f"{len(frozen)}, with weights")
        return
    found = f"{untouched} of {len(frozen)} normalise nothing: no weights were loaded"
    advice = 'pretrained weights (train.init_checkpoint, or those of the backbone), or norm="BN"'
    yield Finding("frozen norms", "warning", found, advice)


def _check_classes(config: DictConfig, model: nn.Module) -> Iterator[Finding]:
    student = get_student(model)
    count, names = num_classes_of(student), data_classes(config)
    if names is None:
        yield Finding("classes", "ok", f"{count} of the student; the data have no class names")
    elif len(names) != count:
        found = f"{count} of the student, {len(names)} of the data ({_join(names)})"
        yield Finding("classes", "error", found, f"num_classes={len(names)} of the student")
    else:
        yield Finding("classes", "ok", f"{count} of the student and of the data")
    if not isinstance(model, Distiller) or not model.teacher.has_predictions:
        return
    teacher_count = num_classes_of(model.teacher.detector)
    if old := getattr(student, "num_old_classes", 0):
        found = f"{old} old classes, those of the teacher, and {count - old} new ones"
        yield Finding("class map", "ok", found)
    elif model.class_map is not None:
        state = "ok" if model.class_map.pairs else "warning"
        advice = "" if model.class_map.pairs else "model.teacher.aliases, or features alone"
        yield Finding("class map", state, str(model.class_map), advice)
    elif teacher_count != count:
        found = f"{count} of the student, {teacher_count} of the teacher, compared by number"
        yield Finding("class map", "error", found, "model.teacher.classes, its names")
    else:
        yield Finding("class map", "ok", f"{count} on both sides, compared by number")


def data_classes(config: DictConfig) -> tuple[str, ...] | None:
    try:
        names = check_dataset(dataset_names(config, "train"))
        return class_names(names) if names else None
    except InputError:
        return None


def _join(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def _check_levels(config: DictConfig, model: nn.Module) -> Iterator[Finding]:
    if not isinstance(model, Distiller):
        return
    backbones = model.student.backbone, model.teacher.detector.backbone
    scale = model.teacher.scale
    try:
        matches = match_levels(*backbones, scale=scale)
    except InputError as error:
        yield Finding("levels", "warning", error.found, "losses that do not compare features")
        return
    student, teacher = (backbone.output_shape() for backbone in backbones)
    strides = LevelStrides.of(*backbones, matches, scale)
    pairs = []
    for a, b in matches.items():
        resized = ""
        if strides.is_resized(a):
            resized = f", resized from {teacher[b].stride / scale:.3g}"
        pairs.append(
            f"{a if a == b else f'{a} with {b}'} (stride {student[a].stride}{resized}, "
            f"{student[a].channels} and {teacher[b].channels} channels)"
        )
    yield Finding("levels", "ok", ", ".join(pairs))


def _check_learning_rate(config: DictConfig, model: nn.Module) -> Iterator[Finding]:
    rate = OmegaConf.select(config, "optimizer.lr", default=None)
    batch = OmegaConf.select(config, "dataloader.train.total_batch_size", default=None)
    kind = config.optimizer.get("_target_")
    kind = locate(kind) if isinstance(kind, str) else kind
    name = getattr(kind, "__name__", str(kind))
    if rate is None or batch is None:
        yield Finding("learning rate", "ok", f"{name} without a rate or batch size to check")
        return
    found = f"{rate:g} of {name} at {batch} images an iteration"
    if isinstance(kind, type) and issubclass(kind, torch.optim.SGD):
        two_stage = hasattr(get_student(model), "roi_heads")
        usual = SGD_RATE[two_stage] * batch / REFERENCE_BATCH
        found += f", {rate / usual:.2g} times Detectron2's scaled to it"
        state = _state(rate / usual, *SGD_MULTIPLES)
    elif isinstance(kind, type) and issubclass(kind, torch.optim.Adam):
        usual, state = 1e-4, _state(rate, *ADAM_RATES)
    else:
        usual, state = rate, "ok"
    yield Finding("learning rate", state, found, "" if state == "ok" else f"optimizer.lr={usual:g}")


def _state(value: float, low: float, high: float, too_high: float) -> str:
    if value > too_high:
        return "error"
    return "ok" if low <= value <= high else "warning"
