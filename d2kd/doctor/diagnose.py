"""Run all checks, in the order in which a run would fail."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import instantiate
from omegaconf import DictConfig
from torch import nn

from ..config import is_distiller, student_node, with_defaults, without_weights
from ..engine import Trainer
from ..engine.checkpoint import unwrap_ddp
from ..modeling.weights import CLASSES_KEY, PIXEL_STATISTICS, load_checkpoint, without_wrapper
from ..utils.console import suppress_output
from ..utils.errors import InputError
from .data_checks import check_data
from .findings import Finding
from .runtime_checks import (
    check_features,
    check_inputs,
    check_losses,
    check_schedule,
    check_sizes,
    check_teacher,
)
from .static_checks import data_classes, sanity_check

STATISTIC_BATCHES = 4


def diagnose(
    config: DictConfig,
    *,
    images: int = 200,
    iterations: int = 20,
) -> Iterator[Finding]:
    """Build everything in a recipe and check it. Nothing is written.

    Args:
        config: a recipe.
        images: number of images to decode from each data set, and to evaluate the teacher on; 0: all.
        iterations: training iterations before losses are compared; 0: skip this.

    Yields:
        Finding: the result of each check.

    Raises:
        InputError: if a part of the recipe is missing.
    """
    config = with_defaults(config)
    yield from check_data(config, images)
    yield from _check_checkpoints(config)
    try:
        with suppress_output():
            trainer = Trainer(config)
            trainer.resume_or_load(resume=False)
    except InputError as error:
        yield Finding("the run", "error", f"{error.culprit}: {error.found}", error.expected)
        return
    yield from sanity_check(trainer.cfg, trainer.model)
    try:
        loader = trainer._trainer.data_loader
        batches = list(itertools.islice(loader, STATISTIC_BATCHES))
        yield from check_inputs(trainer, batches)
        yield from check_sizes(trainer, batches)
        yield from check_schedule(trainer)
        model = unwrap_ddp(trainer.model)
        if is_distiller(config.model):
            yield from check_features(model, batches)
        if is_distiller(config.model) and "evaluator" in config.dataloader:
            yield from check_teacher(trainer.cfg, model, images)
        if iterations:
            yield from check_losses(trainer, iterations)
    except InputError as error:
        yield Finding("a step", "error", f"{error.culprit}: {error.found}", error.expected)


def _check_checkpoints(config: DictConfig) -> Iterator[Finding]:
    """Check how many weights of each checkpoint match its detector."""
    if config.train.init_checkpoint:
        file = config.train.init_checkpoint
        yield from _check_file("student's weights", student_node(config.model), file, partly=True)
    if not is_distiller(config.model):
        return
    teacher = config.model.teacher
    if not teacher.get("weights"):
        found, advice = "none: it is untrained", "model.teacher.weights=FILE"
        yield Finding("teacher's weights", "error", found, advice)
        return
    yield from _check_file("teacher's weights", teacher.detector, teacher.weights, partly=False)
    yield from _check_teacher_classes(config, teacher)


def _check_file(subject: str, node: DictConfig, file: str, *, partly: bool) -> Iterator[Finding]:
    try:
        with suppress_output():
            detector: nn.Module = instantiate(without_weights(node))
        checkpoint = without_wrapper(load_checkpoint(file), detector, file)
        given = set(checkpoint["model"])
        with suppress_output():
            bad = DetectionCheckpointer(detector, save_to_disk=False)._load_model(checkpoint)
    except InputError as error:
        yield Finding(subject, "error", f"{error.culprit}: {error.found}", error.expected)
        return
    own = set(detector.state_dict())
    misshapen = [key for key, *_ in bad.incorrect_shapes]
    missing = [key for key in bad.missing_keys if key not in misshapen]
    unexpected = [key for key in bad.unexpected_keys if key not in PIXEL_STATISTICS]
    matched = len(own) - len(own.intersection(missing)) - len(misshapen)
    found = (
        f"{matched} of {len(own)} tensors matched, {len(missing)} missing, "
        f"{len(unexpected)} of {len(given)} unexpected, {len(misshapen)} of another shape"
    )
    examples = [*misshapen, *missing, *unexpected]
    # A student should at least get the weights of an image classifier.
    wanted = {key for key in own if key.startswith("backbone.bottom_up.")} or own
    met = wanted.difference(missing, misshapen)
    if not examples or (partly and 2 * len(met) > len(wanted)):
        yield Finding(subject, "ok", found)
    elif partly and matched:
        advice = f"weights of this backbone, unless so little is meant; see {examples[0]}"
        yield Finding(subject, "warning", found, advice)
    else:
        advice = f"a checkpoint of this detector; see {examples[0]}"
        yield Finding(subject, "error", found, advice)


def _check_teacher_classes(config: DictConfig, teacher: DictConfig) -> Iterator[Finding]:
    """Report whether the class names in the teacher's checkpoint, which are used if none are given, are the data's."""
    try:
        stored, names = load_checkpoint(teacher.weights).get(CLASSES_KEY), data_classes(config)
    except InputError:
        return
    if teacher.get("classes") is not None or stored is None or names is None:
        return
    same = list(stored) == list(names)
    found = "the file names those of the data" if same else f"the file names {', '.join(stored)}"
    yield Finding("teacher's classes", "ok", found)
