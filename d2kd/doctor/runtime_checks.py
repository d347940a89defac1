"""Checks that run the model: its inputs, the teacher's AP on a few images, and the gradient of each loss."""

from __future__ import annotations

import inspect
import itertools
import math
import statistics
import tempfile
from collections.abc import Iterator, Mapping, MutableSequence
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.evaluation import DatasetEvaluators
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig
from torch import Tensor

from ..data import build_test_loader
from ..data.datasets import sample_evenly
from ..engine import Trainer, build_evaluator
from ..engine.checkpoint import get_student, unwrap_ddp
from ..engine.hooks import measure_features
from ..engine.train_step import NonFiniteError
from ..modeling import Distiller
from ..modeling.outputs import capture
from ..structures.class_map import num_classes_of
from ..utils.console import suppress_output
from .findings import Finding

MAX_MEAN, STD_RANGE = 1.5, (0.2, 100)
"""Of normalised pixels: largest usual mean, in standard deviations, and their usual range (57 if pixel_std is 1)."""

MIN_AP, LOW_AP = 1.0, 10.0  # AP of 100
DOMINANT_RATIO = 4.0
"""RMS of a level's features relative to the other levels, from which this level dominates an imitation loss."""


def check_inputs(trainer: Trainer, batches: list[list[dict]]) -> Iterator[Finding]:
    """Check the range of the pixels, and their statistics after the student's normalisation."""
    examples = list(itertools.chain.from_iterable(batches))
    highest = max(float(example["image"].max()) for example in examples)
    if highest <= 1:
        found = f"pixels up to {highest:g}"
        yield Finding("inputs", "error", found, "images from 0 to 255, as Detectron2 reads them")
        return
    student = get_student(trainer.model)
    with torch.no_grad():
        pixels = [student.preprocess_image([{"image": x["image"]}]).tensor[0] for x in examples]
    values = torch.cat([p.flatten(1) for p in pixels], dim=1)
    mean, deviation = values.mean(dim=1), values.std(dim=1)
    usual = bool((mean.abs() <= MAX_MEAN * deviation).all())
    usual &= bool((deviation >= STD_RANGE[0]).all() and (deviation <= STD_RANGE[1]).all())
    found = "normalised: mean {}, deviation {}".format(
        *(", ".join(f"{v:.2f}" for v in x.tolist()) for x in (mean, deviation))
    )
    advice = "" if usual else "the student's pixel_mean and pixel_std, those of its weights"
    yield Finding("inputs", "ok" if usual else "warning", found, advice)


def check_teacher(config: DictConfig, model: Distiller, images: int) -> Iterator[Finding]:
    """Evaluate the teacher on ``images`` evenly spaced test images, or on all if ``images`` is 0.

    A teacher without common classes, or with more classes and no names, is skipped; the class map is checked elsewhere.
    """
    class_map = model.class_map
    with suppress_output():
        detect = model.teacher.predictor_in_student_classes(
            num_classes_of(model.student), class_map
        )
    if detect is None:
        return
    dataset = instantiate(config.dataloader.test.dataset)
    records = sample_evenly(dataset, images or len(dataset))
    loader = build_test_loader(records, mapper=instantiate(config.dataloader.test.mapper))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), suppress_output():
        evaluators = build_evaluator(config, folder)
        evaluators = list(evaluators) if isinstance(evaluators, MutableSequence) else [evaluators]
        evaluator = DatasetEvaluators(evaluators)
        evaluator.reset()
        for batch in loader:
            evaluator.process(batch, detect(batch))
        found: dict[str, Any] = {}
        for one in evaluators:
            options: dict[str, Any] = {}
            if "img_ids" in inspect.signature(one.evaluate).parameters:
                options["img_ids"] = [record["image_id"] for record in records]
            found |= one.evaluate(**options) or {}
    value = found.get("bbox", {}).get("AP", math.nan)
    text = f"AP {value:.1f} on {len(records)} of {len(dataset)} test images"
    # A class that the teacher lacks counts as an AP of 0.
    known = 1.0 if class_map is None else class_map.shared_fraction
    if not value >= MIN_AP * known:
        advice = "its weights, its config, its classes, their order"
        yield Finding("teacher", "error", text, advice)
    elif value < LOW_AP * known:
        yield Finding("teacher", "warning", text, "a better teacher, if there is one")
    else:
        yield Finding("teacher", "ok", text)


def check_features(model: Distiller, batches: list[list[dict]]) -> Iterator[Finding]:
    """Compare the RMS of the teacher's features between the levels that losses of raw features use.

    A level to which no object is assigned in training often has large features that only suppress detections.
    """
    levels: dict[str, Mapping[str, str]] = {}  # loss -> student's level -> teacher's level
    for name, loss in model.losses.by_name.items():
        for part in loss.modules():  # TAR's feature term is an ImitationLoss
            in_units = getattr(part, "normalize", False)  # of the teacher, level by level
            if isinstance(compared := getattr(part, "levels", None), Mapping) and not in_units:
                levels[name] = compared
    pairs = {level: match for compared in levels.values() for level, match in compared.items()}
    if len(pairs) < 2:
        return
    with torch.no_grad():
        maps = [model.teacher.outputs(batch).features for batch in batches]
    strength = {
        level: math.sqrt(statistics.fmean(m[match].float().square().mean().item() for m in maps))
        for level, match in pairs.items()
    }
    dominant = []
    for level, value in strength.items():
        usual = statistics.median(other for name, other in strength.items() if name != level)
        if value > DOMINANT_RATIO * usual:
            dominant.append(level)
    found = ", ".join(f"{level} {value:.3g}" for level, value in strength.items())
    if not dominant:
        yield Finding("teacher's features", "ok", found)
        return
    rest = {name: [x for x in compared if x not in dominant] for name, compared in levels.items()}
    overrides = [f"model.losses.{name}.levels=[{','.join(few)}]" for name, few in rest.items()]
    found += f": {', '.join(dominant)} outweighs the others"
    advice = f"if no objects are learned there, {' '.join(overrides)}"
    yield Finding("teacher's features", "warning", found, advice)


def check_losses(trainer: Trainer, iterations: int) -> Iterator[Finding]:
    """Train for a few iterations, then compare the losses by their gradient in the student's features.

    Loss weights are those of the middle of the run, where losses that decay or start late are active. A gradient that is
    0 or not finite is reported. Its size is only printed: it does not say which weight is best.

    Args:
        trainer: a new trainer. Its model is modified; nothing is written.
        iterations: number of training iterations.
    """
    inner, model = trainer._trainer, unwrap_ddp(trainer.model)
    if isinstance(model, Distiller):
        measure_features(model, trainer.cfg)
    model.train()
    try:
        with EventStorage() as storage:
            for _ in range(iterations):
                inner.run_step()
                trainer.scheduler.step()
                storage.step()
        rows = _gradients(trainer, next(inner._batches))
    except NonFiniteError as error:
        found = f"{error.culprit} is {error.value} within {iterations} iterations"
        yield Finding("losses", "error", found, "a smaller optimizer.lr, or train.clip_gradients")
        return
    task = rows.pop("task losses")
    yield Finding("task losses", "ok", f"{task[0]:.3g} after {iterations} iterations, gradient 1")
    for name, (value, norm) in rows.items():
        if norm is None:
            yield Finding(name, "ok", f"{value:.3g}, trains what the loss owns alone")
            continue
        if not math.isfinite(value) or not math.isfinite(norm):
            yield Finding(name, "error", f"{value}, gradient {norm}", "a smaller weight")
            continue
        ratio = norm / task[1] if task[1] else math.inf
        found = f"{value:.3g}, gradient {ratio:.2g} of the task losses'"
        if ratio == 0:
            yield Finding(
                name, "warning", found, "a weight above 0, or levels and classes that both have"
            )
        else:
            yield Finding(name, "ok", found)


def _gradients(trainer: Trainer, batch: list[dict]) -> dict[str, tuple[float, float | None]]:
    """Return value and gradient norm in the student's features, of the task losses and each distillation loss."""
    model = unwrap_ddp(trainer.model)
    student = get_student(model)
    with (
        EventStorage(start_iter=trainer.max_iter // 2),
        capture({"backbone": student.backbone}) as calls,
    ):
        losses = trainer._trainer._forward(batch)
    ((_, features),) = calls["backbone"]
    maps = [value for value in features.values() if value.requires_grad]
    own = {k: v for k, v in losses.items() if not k.startswith("distill/")}
    rows = {"task losses": _value_and_norm(sum(own.values()), maps)}
    rows |= {k: _value_and_norm(v, maps) for k, v in losses.items() if k not in own}
    return rows


def _value_and_norm(loss: Tensor, maps: list[Tensor]) -> tuple[float, float | None]:
    found = torch.autograd.grad(loss, maps, retain_graph=True, allow_unused=True)
    found = [gradient.float().norm() for gradient in found if gradient is not None]
    return loss.item(), torch.stack(found).norm().item() if found else None
