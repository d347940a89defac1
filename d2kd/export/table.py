"""What a study ends with: teacher, baseline, student and the student's exported file in one table.

AP is measured by the recipe's own evaluator, that of a file through its own runtime. Time is one image after the
other on the CPU, from pixels to detections; the rows take turns on the same images.
"""

from __future__ import annotations

import itertools
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from detectron2.config import instantiate
from fvcore.nn import FlopCountAnalysis
from omegaconf import DictConfig, OmegaConf
from tabulate import tabulate
from torch import nn

from .. import __version__
from ..config import builds, is_distiller, reading_mapper, student_of, teacher_of, without_weights
from ..data import TwoScales
from ..data.datasets import dataset_names
from ..engine.checkpoint import learned_classes
from ..engine.evaluation import build_test_loader, do_test
from ..modeling.meta_arch.distiller import class_map_of
from ..modeling.weights import CLASSES, load_strict, read
from ..structures.class_map import num_classes_of
from ..utils.console import quiet
from ..utils.env import versions
from ..utils.errors import InputError
from .formats import ExportedDetector, of_image, strangers, tracing

FLOP_IMAGES = 3  # what two-stage detectors compute depends on the picture
WARM_UPS = 2
MEGABYTE = 10**6


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Args:
        name: what to call it.
        detect: gives detections of Detectron2's batches.
        module: whose operations are counted.
        size: bytes of its weights; of a file, all of it.
        inputs: gives what the module sees of Detectron2's batches.
        measurable: whether its detections are in the data's classes, so that they have an AP.
    """

    name: str
    detect: Callable[[list[dict]], list[dict]]
    module: nn.Module
    size: int
    inputs: Callable[[list[dict]], list[dict]] = list
    measurable: bool = True


def built(config: DictConfig, weights: str) -> nn.Module:
    """The recipe's student with these weights, to detect on the CPU.

    Raises:
        InputError: the weights cannot be read or do not fit.
    """
    detector = instantiate(without_weights(student_of(config.model)))
    load_strict(detector, weights)
    return detector.eval().cpu()


def detector_row(name: str, detector: nn.Module) -> Row:
    """A line for a detector."""
    size = sum(value.nbytes for value in detector.state_dict().values())
    return Row(name, detector, detector, size)


def teacher_row(config: DictConfig, student: nn.Module) -> Row | None:
    """A line for the recipe's teacher, if it has one; its AP is that of the classes it shares with the student."""
    if not is_distiller(config.model):
        return None
    teacher = instantiate(teacher_of(config.model))
    class_map = class_map_of(student, teacher, instantiate(config.model.get("classes")))
    detect = teacher.as_student(num_classes_of(student), class_map)
    return replace(
        detector_row("teacher", teacher.detector.cpu()),
        detect=detect or teacher.detect,
        inputs=teacher.own_inputs,
        measurable=detect is not None,
    )


def exported_row(name: str, exported: ExportedDetector, detector: nn.Module) -> Row:
    """A line for a file; its operations are the detector's, whose trace it is."""
    return Row(name, exported, detector, exported.path.stat().st_size)


def metadata(config: DictConfig, detector: nn.Module, weights: str) -> dict[str, str]:
    """What a user of the file must know, as strings: classes, image format, how test images are resized.

    Raises:
        InputError: neither the weights nor the data tell the classes' names.
    """
    mapper = OmegaConf.select(config, "dataloader.test.mapper", default=None)
    reading = reading_mapper(mapper)
    own = getattr(detector, "input_format", "BGR")
    resizing = [str(instantiate(one)) for one in reading.get("augmentations", ())]
    while mapper is not None and builds(mapper, TwoScales):
        resizing.append(f"1/{mapper.scale} (means of {mapper.scale} x {mapper.scale} pixels)")
        mapper = mapper.mapper
    return {
        "classes": json.dumps(_names(config, detector, weights)),
        "image_format": reading.get("image_format", own),
        "pixel_range": "0 to 255",
        "resizing": " ".join(resizing) or "none",
        "detector": type(detector).__name__,
        "d2kd": __version__,
    }


def _names(config: DictConfig, detector: nn.Module, weights: str) -> list[str]:
    names = read(weights).get(CLASSES)
    if names is None:
        names = learned_classes(detector, dataset_names(config, "test"))
    if names is None or len(names) != num_classes_of(detector):
        found = f"{len(names or ())} names of {num_classes_of(detector)} classes"
        raise InputError(weights, found, "a checkpoint or test data that name the classes")
    return list(names)


def first_images(config: DictConfig, count: int) -> list[list[dict]]:
    """The first images of the test data, each a batch of its own.

    Raises:
        InputError: the recipe has no test data or no evaluator.
    """
    loader = build_test_loader(config)
    if loader is None:
        found = "no dataloader.test or no dataloader.evaluator"
        raise InputError("the recipe", found, "data to compare on, or --images 0")
    return [[image] for image in itertools.islice(itertools.chain.from_iterable(loader), count)]


@torch.no_grad()
def agreement(ours: Callable, theirs: Callable, batches: Sequence[list[dict]]) -> tuple[int, int]:
    """How many detections both give, of either side together, and how many are the one's alone."""
    total = alone = 0
    for batch in batches:
        for one, other in zip(ours(batch), theirs(batch), strict=True):
            total += len(one["instances"]) + len(other["instances"])
            alone += strangers(one["instances"], other["instances"])
    return total, alone


@torch.no_grad()
def milliseconds(rows: Sequence[Row], batches: Sequence[list[dict]]) -> list[float]:
    """The median time of an image, for each row."""
    for row, batch in itertools.product(rows, batches[:WARM_UPS]):
        row.detect(batch)
    times: list[list[float]] = [[] for _ in rows]
    for batch in batches:
        for row, found in zip(rows, times, strict=True):
            start = time.perf_counter()
            row.detect(batch)
            found.append((time.perf_counter() - start) * 1000 / len(batch))
    return [median(found) for found in times]


@torch.no_grad()
def gflops(detector: nn.Module, batches: Sequence[list[dict]]) -> float:
    """Multiply-adds of an image, as fvcore counts them, in 10^9; the mean over the batches' first."""
    counts = []
    for first, *_ in batches:
        model = of_image(detector, first["image"].float())
        with tracing(), quiet():
            counter = FlopCountAnalysis(model, model.flattened_inputs)
            counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
            counts.append(counter.total())
    return mean(counts) / 1e9


def compare(
    config: DictConfig, rows: Sequence[Row], batches: Sequence[list[dict]], output: Path
) -> dict[str, Any]:
    """Measure every row.

    Args:
        config: the recipe, for its test data and evaluator.
        rows: what to measure.
        batches: images to time and to count operations on.
        output: for the evaluator's files.

    Returns:
        what ``table.json`` holds: the circumstances and ``rows`` of ``name``, ``AP``, ``AP50``,
        ``milliseconds``, ``megabytes`` and ``gflops``.
    """
    times = milliseconds(rows, batches)
    measured = []
    for row, spent in zip(rows, times, strict=True):
        found = {}
        if row.measurable:
            with quiet():
                found = do_test(config, row.detect, output_dir=output / "inference" / row.name)
        box = found.get("bbox", {})
        measured.append(
            {
                "name": row.name,
                "AP": box.get("AP"),
                "AP50": box.get("AP50"),
                "milliseconds": spent,
                "megabytes": row.size / MEGABYTE,
                "gflops": gflops(row.module, [row.inputs(b) for b in batches[:FLOP_IMAGES]]),
            }
        )
    return {
        "schema": 1,
        "command": shlex.join(sys.argv),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "images_timed": sum(map(len, batches)),
        "rows": measured,
    }


def table(result: Mapping[str, Any]) -> str:
    """A result of :func:`compare` as text."""
    columns = ("name", "AP", "AP50", "milliseconds", "megabytes", "gflops")
    return tabulate(
        [[row[column] for column in columns] for row in result["rows"]],
        ["", "AP", "AP50", "ms per image", "MB", "GFLOPs"],
        floatfmt=("", ".2f", ".2f", ".1f", ".2f", ".3f"),
        missingval="-",
    )
