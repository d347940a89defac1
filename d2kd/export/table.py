"""Compare teacher, baseline, student and the exported student in one table.

AP is that of the recipe's evaluator; an exported file runs in its own runtime. Time is that of single images on the
CPU, from pixels to detections, where the rows alternate on the same images.
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
from detectron2.data.transforms import ResizeShortestEdge
from fvcore.nn import FlopCountAnalysis
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from tabulate import tabulate
from torch import nn

from .. import __version__
from ..config import (
    base_mapper,
    full_size_mapper,
    is_distiller,
    is_feature_extractor,
    student_node,
    teacher_node,
    without_weights,
)
from ..data.datasets import dataset_names, training_classes
from ..engine.checkpoint import training_class_names
from ..engine.evaluation import build_recipe_test_loader, do_test
from ..modeling.meta_arch.distiller import build_class_map
from ..modeling.weights import CLASSES_KEY, load_checkpoint, load_weights_strict
from ..structures.class_map import num_classes_of
from ..utils.console import suppress_output
from ..utils.env import collect_versions
from ..utils.errors import InputError
from .formats import ExportedDetector, count_mismatches, single_image_model, tracing

FLOP_IMAGES = 3  # operations of two-stage detectors depend on the image
WARM_UPS = 2
MEGABYTE = 10**6


@dataclass(frozen=True)
class DetectorRow:
    """A detector to measure, one row of the table.

    Args:
        name: name in the table.
        detect: maps Detectron2's batches to detections.
        module: the model whose operations are counted.
        size: bytes of the weights, or of the exported file.
        inputs: converts Detectron2's batches to the module's inputs.
        has_ap: whether it predicts the data's classes, so that AP can be computed.
    """

    name: str
    detect: Callable[[list[dict]], list[dict]]
    module: nn.Module
    size: int
    inputs: Callable[[list[dict]], list[dict]] = list
    has_ap: bool = True


def build_student(config: DictConfig, weights: str, has_ap: bool = False) -> nn.Module:
    """Build the recipe's student with these weights, in eval mode on the CPU.

    Args:
        has_ap: whether its AP is measured, so that the file's class names, if any, must be those of the test data.

    Raises:
        InputError: if the weights cannot be read or do not match.
    """
    detector = instantiate(without_weights(student_node(config.model)))
    classes = training_class_names(detector, dataset_names(config, "test")) if has_ap else None
    load_weights_strict(detector, weights, classes)
    return detector.eval().cpu()


def detector_row(name: str, detector: nn.Module) -> DetectorRow:
    """Return the row of a detector."""
    size = sum(value.nbytes for value in detector.state_dict().values())
    return DetectorRow(name, detector, detector, size)


def teacher_row(config: DictConfig, student: nn.Module) -> DetectorRow | None:
    """Return the row of the recipe's teacher, if it is a detector. Its AP is over the student's classes."""
    if not is_distiller(config.model) or is_feature_extractor(config.model.teacher):
        return None
    teacher = instantiate(teacher_node(config.model))
    classes = instantiate(config.model.get("classes"))
    if classes is None and teacher.classes is None and teacher.checkpoint_classes is not None:
        classes = training_classes(config)
    class_map = build_class_map(student, teacher, classes)
    detect = teacher.predictor_in_student_classes(num_classes_of(student), class_map)
    return replace(
        detector_row("teacher", teacher.detector.cpu()),
        detect=detect or teacher.detect,
        inputs=teacher.convert_inputs,
        has_ap=detect is not None,
    )


def exported_row(name: str, exported: ExportedDetector, detector: nn.Module) -> DetectorRow:
    """Return the row of an exported file; its operations are those of the detector."""
    return DetectorRow(name, exported, detector, exported.path.stat().st_size)


def export_metadata(config: DictConfig, detector: nn.Module, weights: str) -> dict[str, str]:
    """Return the metadata of an exported file: class names, image format, resizing of test images, as strings.

    ``resize`` is only there if the test mapper resizes as :class:`detectron2.data.transforms.ResizeShortestEdge` does.

    Raises:
        InputError: if neither the weights nor the data have class names.
    """
    mapper = OmegaConf.select(config, "dataloader.test.mapper", default=None)
    reading = base_mapper(mapper)
    own = getattr(detector, "input_format", "BGR")
    augmentations = [instantiate(one) for one in reading.get("augmentations", ())]
    resizing = [str(one) for one in augmentations]
    sides = _resized_sides(augmentations) if reading is mapper else None
    while inner := full_size_mapper(mapper):
        mapper, scale = inner
        way = (
            f"means of {scale} x {scale} pixels" if scale == int(scale) else "antialiased bilinear"
        )
        resizing.append(f"1/{scale} ({way})")
    return {
        **({} if sides is None else {"resize": json.dumps(sides)}),
        "classes": json.dumps(_names(config, detector, weights)),
        "image_format": reading.get("image_format", own),
        "pixel_range": "0 to 255",
        "resizing": " ".join(resizing) or "none",
        "detector": type(detector).__name__,
        "d2kd": __version__,
    }


def _resized_sides(augmentations: Sequence[Any]) -> list[int] | None:
    """Return the length of the shorter side and the maximum of the longer one; None if images are resized otherwise."""
    if len(augmentations) != 1 or type(augmentations[0]) is not ResizeShortestEdge:
        return None
    [resize] = augmentations
    lengths = set(resize.short_edge_length)
    plain = len(lengths) == 1 and resize.interp == Image.BILINEAR
    return [*lengths, resize.max_size] if plain else None


def _names(config: DictConfig, detector: nn.Module, weights: str) -> list[str]:
    names = load_checkpoint(weights).get(CLASSES_KEY)
    if names is None:
        names = training_class_names(detector, dataset_names(config, "test"))
    if names is None or len(names) != num_classes_of(detector):
        found = f"{len(names or ())} names of {num_classes_of(detector)} classes"
        raise InputError(weights, found, "a checkpoint or test data that name the classes")
    return list(names)


def first_test_images(config: DictConfig, count: int) -> list[list[dict]]:
    """Return the first test images, as batches of one.

    Raises:
        InputError: if the recipe has no test data or no evaluator.
    """
    loader = build_recipe_test_loader(config)
    if loader is None:
        found = "no dataloader.test or no dataloader.evaluator"
        raise InputError("the recipe", found, "data to compare on, or --images 0")
    return [[image] for image in itertools.islice(itertools.chain.from_iterable(loader), count)]


@torch.no_grad()
def compare_detections(
    first: Callable, second: Callable, batches: Sequence[list[dict]]
) -> tuple[int, int]:
    """Return the number of detections of both, and how many of them have no match in the other."""
    total = unmatched = 0
    for batch in batches:
        for a, b in zip(first(batch), second(batch), strict=True):
            total += len(a["instances"]) + len(b["instances"])
            unmatched += count_mismatches(a["instances"], b["instances"])
    return total, unmatched


@torch.no_grad()
def time_per_image(rows: Sequence[DetectorRow], batches: Sequence[list[dict]]) -> list[float]:
    """Return the median time per image of each row."""
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
    """Return fvcore's multiply-adds per image in 10^9, averaged over the first image of each batch."""
    counts = []
    for first, *_ in batches:
        model = single_image_model(detector, first["image"].float())
        with tracing(), suppress_output():
            counter = FlopCountAnalysis(model, model.flattened_inputs)
            counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
            counts.append(counter.total())
    return mean(counts) / 1e9


def measure_rows(
    config: DictConfig, rows: Sequence[DetectorRow], batches: Sequence[list[dict]], output: Path
) -> dict[str, Any]:
    """Measure all rows.

    Args:
        config: the recipe, for its test data and evaluator.
        rows: the detectors.
        batches: images for times and operation counts.
        output: folder of the evaluator's files.

    Returns:
        dict: the content of ``table.json``: versions and settings, and ``rows`` of ``name``, ``AP``, ``AP50``,
        ``mask_AP`` (None without masks), ``milliseconds``, ``megabytes`` and ``gflops``.
    """
    times = time_per_image(rows, batches)
    measured = []
    for row, spent in zip(rows, times, strict=True):
        found = {}
        if row.has_ap:
            with suppress_output():
                found = do_test(config, row.detect, output_dir=output / "inference" / row.name)
        box, masks = (found.get(task, {}) for task in ("bbox", "segm"))
        measured.append(
            {
                "name": row.name,
                "AP": box.get("AP"),
                "AP50": box.get("AP50"),
                "mask_AP": masks.get("AP"),
                "milliseconds": spent,
                "megabytes": row.size / MEGABYTE,
                "gflops": gflops(row.module, [row.inputs(b) for b in batches[:FLOP_IMAGES]]),
            }
        )
    return {
        "schema": 1,
        "command": shlex.join(sys.argv),
        "versions": collect_versions(),
        "threads": torch.get_num_threads(),
        "images_timed": sum(map(len, batches)),
        "rows": measured,
    }


def format_rows(result: Mapping[str, Any]) -> str:
    """Return the result of :func:`measure_rows` as text."""
    columns = {
        "name": ("", ""),
        "AP": ("AP", ".2f"),
        "AP50": ("AP50", ".2f"),
        "mask_AP": ("mask AP", ".2f"),
        "milliseconds": ("ms per image", ".1f"),
        "megabytes": ("MB", ".2f"),
        "gflops": ("GFLOPs", ".3f"),
    }
    if all(row.get("mask_AP") is None for row in result["rows"]):
        del columns["mask_AP"]
    titles, formats = zip(*columns.values())
    rows = [[row.get(column) for column in columns] for row in result["rows"]]
    return tabulate(rows, titles, floatfmt=formats, missingval="-")
