"""All there is to look at, in the order in which it would fail."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import instantiate
from omegaconf import DictConfig
from torch import nn

from ..config import is_distiller, student_of, with_defaults, without_weights
from ..engine import Trainer
from ..engine.checkpoint import unwrapped
from ..modeling.weights import CLASSES, STATISTICS, read
from ..utils.console import quiet
from ..utils.errors import InputError
from .data import look_at_data
from .findings import Finding
from .first_look import data_classes, first_look
from .measurements import look_at_features, look_at_inputs, look_at_losses, look_at_teacher

STATISTIC_BATCHES = 4


def diagnose(
    config: DictConfig,
    *,
    images: int = 200,
    iterations: int = 20,
    target: float = 1.0,
) -> Iterator[Finding]:
    """Build everything a recipe names, and look at it. Nothing is written.

    Args:
        config: a recipe.
        images: how many of each data set to decode, and to measure the teacher on; 0: all.
        iterations: steps of training before losses are compared; 0: they are not.
        target: see :func:`~d2kd.doctor.measurements.look_at_losses`.

    Yields:
        each finding as it is made.

    Raises:
        InputError: a part of the recipe is missing.
    """
    config = with_defaults(config)
    yield from look_at_data(config, images)
    yield from _weights(config)
    try:
        with quiet():
            trainer = Trainer(config)
            trainer.resume_or_load(resume=False)
    except InputError as error:
        yield Finding("the run", "error", f"{error.culprit}: {error.found}", error.expected)
        return
    yield from first_look(trainer.cfg, trainer.model)
    try:
        loader = trainer._trainer.data_loader
        batches = list(itertools.islice(loader, STATISTIC_BATCHES))
        yield from look_at_inputs(trainer, batches)
        model = unwrapped(trainer.model)
        if is_distiller(config.model):
            yield from look_at_features(model, batches)
        if is_distiller(config.model) and "evaluator" in config.dataloader:
            yield from look_at_teacher(trainer.cfg, model, images)
        if iterations:
            yield from look_at_losses(trainer, iterations, target)
    except InputError as error:
        yield Finding("a step", "error", f"{error.culprit}: {error.found}", error.expected)


def _weights(config: DictConfig) -> Iterator[Finding]:
    """How much of each file its detector takes."""
    if config.train.init_checkpoint:
        file = config.train.init_checkpoint
        yield from _fitting("student's weights", student_of(config.model), file, partly=True)
    if not is_distiller(config.model):
        return
    teacher = config.model.teacher
    if teacher.get("weights") is None:
        found, advice = "none: it knows nothing", "model.teacher.weights=FILE"
        yield Finding("teacher's weights", "error", found, advice)
        return
    yield from _fitting("teacher's weights", teacher.detector, teacher.weights, partly=False)
    yield from _named_classes(config, teacher)


def _fitting(subject: str, node: DictConfig, file: str, *, partly: bool) -> Iterator[Finding]:
    try:
        with quiet():
            detector: nn.Module = instantiate(without_weights(node))
        checkpoint = read(file)
        given = set(checkpoint["model"])
        with quiet():
            bad = DetectionCheckpointer(detector, save_to_disk=False)._load_model(checkpoint)
    except InputError as error:
        yield Finding(subject, "error", f"{error.culprit}: {error.found}", error.expected)
        return
    own = set(detector.state_dict())
    misshapen = [key for key, *_ in bad.incorrect_shapes]
    missing = [key for key in bad.missing_keys if key not in misshapen]
    unexpected = [key for key in bad.unexpected_keys if key not in STATISTICS]
    matched = len(own) - len(own.intersection(missing)) - len(misshapen)
    found = (
        f"{matched} of {len(own)} tensors matched, {len(missing)} missing, "
        f"{len(unexpected)} of {len(given)} unexpected, {len(misshapen)} of another shape"
    )
    examples = [*misshapen, *missing, *unexpected]
    # A classifier's weights are the least that a student is meant to be given.
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


def _named_classes(config: DictConfig, teacher: DictConfig) -> Iterator[Finding]:
    """Whether the teacher's file and the data call the classes alike, where they are compared by number."""
    try:
        theirs, ours = read(teacher.weights).get(CLASSES), data_classes(config)
    except InputError:
        return
    if teacher.get("classes") is not None or theirs is None or ours is None:
        return
    if list(theirs) != list(ours):
        differ = next((k for k, (a, b) in enumerate(zip(theirs, ours)) if a != b), None)
        found = f"{len(theirs)} names in the file, {len(ours)} of the data"
        if differ is not None:
            found = f"class {differ} is {theirs[differ]} in the file, {ours[differ]} in the data"
        yield Finding("teacher's classes", "error", found, "model.teacher.classes, its names")
    else:
        yield Finding("teacher's classes", "ok", "the file names those of the data")
