"""Checks that run the model: its inputs, the teacher's AP on a few images, and the gradient of each loss."""

from __future__ import annotations

import inspect
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, MutableSequence
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.evaluation import DatasetEvaluators
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig
from torch import Tensor, nn

from ..data import build_test_loader
from ..data.datasets import UNLABELLED, sample_evenly
from ..engine import Trainer, build_evaluator
from ..engine.checkpoint import get_student, unwrap_ddp
from ..engine.hooks import measure_features
from ..engine.train_step import NonFiniteError
from ..losses import ICDLoss
from ..modeling import Distiller
from ..modeling.outputs import capture
from ..structures.class_map import num_classes_of
from ..utils.console import suppress_output
from ..utils.memory import PeakMemory
from .findings import Finding

MAX_MEAN, STD_RANGE = 1.5, (0.2, 100)
"""Of normalised pixels: largest usual mean, in standard deviations, and their usual range (57 if pixel_std is 1)."""

EPOCHS = (3, 500)
"""Usual passes over the training images: fewer learn little, more learn the images by heart."""

SHORT_ICD_RUN = 20_000  # iterations, see aux_warmup of ICDLoss
MIN_SHAPE_IOU, MAX_UNLIKE = 0.5, 0.2
"""Least IoU of an object and an anchor at the same centre, and the fraction of objects that may have less."""

MAX_TINY = 0.1
"""Fraction of objects that may be shorter than one cell of the finest feature map."""

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


def check_schedule(trainer: Trainer) -> Iterator[Finding]:
    """Check how often each image is used, and whether the run is long enough for its losses."""
    iterations, images = trainer.max_iter, trainer._count_images()
    if images and trainer._batch_size:
        epochs = iterations * trainer._batch_size / images
        found = f"{iterations} iterations use each of {images} images {epochs:.3g} times"
        usual = EPOCHS[0] <= epochs <= EPOCHS[1]
        nearest = min(max(epochs, EPOCHS[0]), EPOCHS[1]) * images / trainer._batch_size
        advice = "" if usual else f"train.max_iter={math.ceil(nearest)}, unless this is meant"
        yield Finding("schedule", "ok" if usual else "warning", found, advice)
    model = unwrap_ddp(trainer.model)
    for name, loss in model.losses.by_name.items() if isinstance(model, Distiller) else ():
        if isinstance(loss, ICDLoss) and not loss.aux_warmup and iterations < SHORT_ICD_RUN:
            found = f"the decoder of ICD learns little in {iterations} iterations"
            advice = f"model.losses.{name}.aux_warmup=0.3"
            yield Finding("schedule", "warning", found, advice)


def check_sizes(trainer: Trainer, batches: list[list[dict]]) -> Iterator[Finding]:
    """Check the size of the objects in training images against feature maps and anchors."""
    student, examples = get_student(trainer.model), list(itertools.chain.from_iterable(batches))
    boxes = [x["instances"].gt_boxes.tensor for x in examples if "instances" in x]
    boxes = torch.cat(boxes) if boxes else torch.zeros(0, 4)
    if not len(boxes) or boxes.shape[1] != 4:  # rotated
        return
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-3)
    lengths = sides.prod(dim=1).sqrt()
    low, high = lengths.quantile(torch.tensor([0.05, 0.95])).tolist()
    height, width = (max(x["image"].shape[k] for x in examples) for k in (1, 2))
    stride = min(spec.stride for spec in student.backbone.output_shape().values())
    tiny = (lengths < stride).float().mean().item()
    found = (
        f"images up to {width} x {height}, nine of ten objects {low:.0f} to {high:.0f} pixels long"
    )
    if tiny > MAX_TINY:
        found += f"; {100 * tiny:.0f} % are shorter than a cell, {stride} pixels"
        yield Finding("image size", "warning", found, "larger images")
    else:
        yield Finding("image size", "ok", found)
    anchors = _anchor_sides(student)
    if anchors is None:
        return
    common = torch.minimum(sides[:, None], anchors).prod(dim=2)
    union = sides.prod(dim=1)[:, None] + anchors.prod(dim=1) - common
    unlike = ((common / union).amax(dim=1) < MIN_SHAPE_IOU).float().mean().item()
    shortest, longest = anchors.prod(dim=1).sqrt().aminmax()
    found = f"{shortest:.0f} to {longest:.0f} pixels, {100 * unlike:.0f} % of the objects fit none"
    usual = unlike <= MAX_UNLIKE
    advice = f"sizes from {low:.0f} to {high:.0f}, and the objects' aspect ratios; d2kd init proposes some"
    yield Finding("anchors", "ok" if usual else "warning", found, "" if usual else advice)


def _anchor_sides(student: nn.Module) -> Tensor | None:
    """Return width and height of the anchors (A, 2) that are matched with objects by their IoU; None without such."""
    matched = getattr(student, "proposal_generator", None) or student
    if not hasattr(matched, "anchor_matcher") or not hasattr(matched, "anchor_generator"):
        return None
    cells = torch.cat([cell.cpu() for cell in matched.anchor_generator.cell_anchors])
    return cells[:, 2:] - cells[:, :2] if cells.shape[1] == 4 else None


def check_teacher(config: DictConfig, model: Distiller, images: int) -> Iterator[Finding]:
    """Evaluate the teacher on ``images`` evenly spaced test images, or on all if ``images`` is 0.

    A teacher without common classes, or with more classes and no names, is skipped; the class map is checked elsewhere.
    """
    if not model.teacher.has_predictions:
        yield Finding("teacher", "ok", "not measured: a FeatureExtractor detects nothing")
        return
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
    if "bbox" not in found:
        yield Finding("teacher", "ok", "not measured: the recipe's evaluator gives no bbox/AP")
        return
    value = found["bbox"].get("AP", math.nan)
    masks = f", mask AP {found['segm'].get('AP', math.nan):.1f}," if "segm" in found else ""
    text = f"AP {value:.1f}{masks} on {len(records)} of {len(dataset)} test images"
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
        measure_features(model, trainer.cfg, inner.data_loader)
    model.train()
    peak, seconds = PeakMemory(trainer.device), []
    try:
        with EventStorage() as storage:
            for _ in range(iterations):
                start = time.perf_counter()
                inner.run_step()
                if trainer.device.type == "cuda":
                    torch.cuda.synchronize(trainer.device)
                seconds.append(time.perf_counter() - start)
                trainer.scheduler.step()
                storage.step()
            inner.read_metrics()
        if seconds:
            yield _cost(seconds, peak.bytes, trainer.max_iter)
        batch = next(one for one in inner._batches if not one[0].get(UNLABELLED))
        rows = _gradients(trainer, batch)
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


def _cost(seconds: list[float], peak: int | None, max_iter: int) -> Finding:
    """Return time and memory of a step, and of the run; the first steps also start workers and choose algorithms."""
    step = statistics.median(seconds[min(2, len(seconds) - 1) :])
    hours = step * max_iter / 3600
    whole = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
    found = f"{step:.3g} s a step, {whole} for {max_iter} without evaluation"
    if peak is not None:
        found += f", {peak / 2**20:.0f} MiB at the peak"
    return Finding("cost", "ok", found)


def _gradients(trainer: Trainer, batch: list[dict]) -> dict[str, tuple[float, float | None]]:
    """Return value and gradient norm in the student's features, of the task losses and each distillation loss."""
    model = unwrap_ddp(trainer.model)
    student = get_student(model)
    with (
        EventStorage(start_iter=trainer.max_iter // 2),
        capture({"backbone": student.backbone}) as calls,
    ):
        losses = trainer._trainer._forward(batch)
    for name, value in losses.items():
        if not name.startswith("distill/") and not value.isfinite().all():
            raise NonFiniteError(name, value.item(), trainer.iter)
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
