"""Run all checks, in the order in which a run would fail."""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import instantiate
from omegaconf import DictConfig
from torch import nn

from ..config import (
    is_distiller,
    is_feature_extractor,
    student_node,
    with_defaults,
    without_weights,
)
from ..engine import Trainer
from ..engine.checkpoint import unwrap_ddp
from ..modeling.weights import CLASSES_KEY, PIXEL_STATISTICS, load_checkpoint, without_wrapper
from ..utils.console import suppress_output
from ..utils.errors import InputError
from .data_checks import check_data
from .findings import Finding, guarded
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
    debug: bool = False,
) -> Iterator[Finding]:
    """Build everything in a recipe and check it. Nothing is written.

    Args:
        config: a recipe.
        images: number of images to decode from each data set, and to evaluate the teacher on; 0: all.
        iterations: training iterations before losses are compared; 0: skip this.
        debug: whether to raise the error of a check that fails, instead of yielding it as a finding.

    Yields:
        Finding: the result of each check.

    Raises:
        InputError: if a part of the recipe is missing.
    """
    config = with_defaults(config)

    def checked(subject: str, check: Callable, *args: Any) -> Iterator[Finding]:
        return guarded(subject, lambda: check(*args), debug=debug)

    yield from checked("data", check_data, config, images, debug)
    yield from checked("student's weights", _check_student_weights, config)
    yield from checked("teacher's weights", _check_teacher_weights, config)
    built: list[Trainer] = []
    yield from checked("the run", _build, config, built)
    taught = is_distiller(config.model) and bool(built)
    if not built and is_distiller(config.model) and config.model.teacher.get("weights"):
        config = copy.deepcopy(config)  # the rest can be checked without them
        config.model.teacher.weights = None
        deque(guarded("the run", lambda: _build(config, built)), maxlen=0)
    if not built:
        return
    (trainer,) = built
    yield from sanity_check(trainer.cfg, trainer.model, debug)
    # Of the iterator from which training continues: Detectron2's loader with aspect ratio grouping yields nothing in a
    # second one, if the first was not used up.
    batches: list[list[dict]] = []
    yield from checked("training images", _read_batches, trainer, batches)
    model = unwrap_ddp(trainer.model)
    if batches:
        yield from checked("inputs", check_inputs, trainer, batches)
        yield from checked("image size", check_sizes, trainer, batches)
    yield from checked("schedule", check_schedule, trainer)
    if taught and batches:
        yield from checked("teacher's features", check_features, model, batches)
    if taught and "evaluator" in config.dataloader:
        yield from checked("teacher", check_teacher, trainer.cfg, model, images)
    if iterations and batches:
        yield from checked("losses", check_losses, trainer, iterations)


def _build(config: DictConfig, built: list[Trainer]) -> Iterator[Finding]:
    """Append a trainer to ``built``; the model need not have its first weights for other checks."""
    with suppress_output():
        built.append(Trainer(config))
        built[0].resume_or_load(resume=False)
    yield from ()


def _read_batches(trainer: Trainer, batches: list[list[dict]]) -> Iterator[Finding]:
    batches += itertools.islice(trainer._trainer._batches, STATISTIC_BATCHES)
    yield from ()


def _check_student_weights(config: DictConfig) -> Iterator[Finding]:
    """Check how many weights of ``train.init_checkpoint`` match the student."""
    if file := config.train.init_checkpoint:
        yield from _check_file("student's weights", student_node(config.model), file, partly=True)


def _check_teacher_weights(config: DictConfig) -> Iterator[Finding]:
    """Check that all of the teacher's weights match."""
    if not is_distiller(config.model):
        return
    teacher = config.model.teacher
    if is_feature_extractor(teacher) and teacher.get("weights") == "":
        return  # those of its backbone, without which the run is not built
    if not teacher.get("weights"):
        found, advice = "none: it is untrained", "model.teacher.weights=FILE"
        yield Finding("teacher's weights", "error", found, advice)
        return
    yield from _check_file("teacher's weights", teacher.detector, teacher.weights, partly=False)
    yield from _check_teacher_classes(config, teacher)


def _check_file(subject: str, node: DictConfig, file: str, *, partly: bool) -> Iterator[Finding]:
    with suppress_output():
        detector: nn.Module = instantiate(without_weights(node))
    checkpoint = without_wrapper(load_checkpoint(file), detector, file)
    given = set(checkpoint["model"])
    with suppress_output():
        bad = DetectionCheckpointer(detector, save_to_disk=False)._load_model(checkpoint)
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
