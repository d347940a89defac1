"""Comparison of regions and features, and cost of inference, in one pass of all detectors over the data set.

The features of an image are computed once per detector. Only counts are stored. They are saved every
:data:`SAVE_PERIOD` images, and an interrupted pass is resumed from there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import BoxMode

from ..data.datasets import sample_evenly
from ..utils.console import ProgressCallback
from ..utils.env import config_hash
from ..utils.io import atomic_write
from ..utils.memory import PeakMemory
from .detections import Warn
from .detectors import EvaluationData, LoadedDetector, build_loader, input_scale
from .features import FeatureSimilarity
from .regions import RegionCounts, why_not_comparable

SAVE_PERIOD = 200
NUM_TIMED, NUM_MEMORY = 8, 3
"""Number of images for the median time, and for the peak memory."""
SCHEMA = 1


@dataclass
class Observation:
    """Results of :func:`observe`.

    Attributes:
        images: number of images.
        regions: returned by :meth:`RegionCounts.summarize`; None if regions cannot be compared.
        why_no_regions: the reason, see :func:`.why_not_comparable`.
        features: returned by :meth:`FeatureSimilarity.summarize`.
        costs: for each detector ``seconds`` and ``memory_mib`` per image.
    """

    images: int
    regions: dict[str, Any] | None
    why_no_regions: str | None
    features: dict[str, Any]
    costs: list[dict[str, float | None]]


def observe(
    detectors: Sequence[LoadedDetector],
    data: EvaluationData,
    classes: Sequence[int],
    thresholds: Sequence[float],
    file: Path,
    progress: ProgressCallback,
    warn: Warn,
    number: int | None = None,
) -> Observation:
    """Run all detectors on the data set, and compare their regions and features.

    Args:
        detectors: the detectors.
        data: the data set.
        classes: indices of the classes that all detectors have.
        thresholds: for each detector the score threshold of its highest F1.
        file: cache file of the counts.
        progress: progress callback.
        warn: callback for warnings.
        number: number of images, spread evenly over the data set; default: all.
    """
    records = data.records if number is None else sample_evenly(data.records, number)
    why = why_not_comparable(detectors)
    parts: dict[str, Any] = {
        "features": FeatureSimilarity(
            [ready.detector.name for ready in detectors], [_channels(ready) for ready in detectors]
        )
    }
    if why is None:
        parts["regions"] = RegionCounts(detectors, data.truth, classes, thresholds)
    key = {
        "schema": SCHEMA,
        "dataset_sha256": data.sha256,
        "detectors": [{"name": r.detector.name, **r.detector.key} for r in detectors],
        "thresholds": [float(t) for t in thresholds]
        if why is None and not parts["regions"].two_stage
        else [],
        "classes": [int(k) for k in classes],
        "images": len(records),
    }
    done, costs = _resume(file, key, parts, warn)
    if costs is None:
        costs = [measure_cost(ready, data) for ready in detectors]
    progress(done, len(records))
    for image, inputs in _images(detectors, records, done):
        with torch.no_grad():
            _see(parts, data, detectors, records[image], inputs)
        if (image + 1) % SAVE_PERIOD == 0 or image + 1 == len(records):
            _save(file, key, parts, image + 1, costs)
        progress(image + 1, len(records))
    regions = parts["regions"].summarize() if why is None else None
    return Observation(len(records), regions, why, parts["features"].summarize(), costs)


def _channels(ready: LoadedDetector) -> dict[str, int]:
    return {
        p: shape.channels for p, shape in ready.teacher.detector.backbone.output_shape().items()
    }


def _images(
    detectors: Sequence[LoadedDetector], records: list[dict], begin: int
) -> Iterator[tuple[int, list[list[dict]]]]:
    """Yield the index of each image and its batch for each detector. Detectors with equal mappers share a loader."""
    if begin == len(records):
        return
    alike = [config_hash(ready.detector.mapper) for ready in detectors]
    loaders = {
        key: build_loader(detectors[alike.index(key)].detector, records, begin)
        for key in dict.fromkeys(alike)
    }
    for image, batches in enumerate(zip(*loaders.values()), begin):
        read = dict(zip(loaders, batches))
        yield image, [read[key] for key in alike]


def _see(
    parts, data: EvaluationData, detectors: Sequence[LoadedDetector], record: dict, inputs
) -> None:
    place = data.index_of[record["image_id"]]
    outputs = [ready.teacher.outputs(batch) for ready, batch in zip(detectors, inputs)]
    [first] = inputs[0]
    in_image = (data.truth.image == place) & ~data.truth.crowd
    xywh = torch.as_tensor(data.truth.box[in_image], dtype=torch.float32)
    height, width = first["image"].shape[-2:]
    boxes = BoxMode.convert(xywh, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS) * input_scale(first)
    padded = tuple(outputs[0].images.tensor.shape[-2:])
    parts["features"].update([o.features for o in outputs], (height, width), padded, boxes)
    if "regions" in parts:
        parts["regions"].update(place, [batch[0] for batch in inputs], outputs)


def _save(file: Path, key: dict, parts: dict[str, Any], done: int, costs) -> None:
    header = json.dumps({"key": key, "done": done, "costs": costs})
    counts = {f"{name}/{k}": v for name, part in parts.items() for k, v in part.counts.items()}
    with atomic_write(file) as temporary, open(temporary, "wb") as stream:
        np.savez_compressed(stream, header=header, **counts)


def _resume(file: Path, key: dict, parts: dict[str, Any], warn: Warn):
    """Load the counts of an earlier pass; return its number of images and its costs."""
    if not file.is_file():
        return 0, None
    try:
        with np.load(file) as content:
            header = json.loads(str(content["header"]))
            if header["key"] == key:
                for name, part in parts.items():
                    for k, counts in part.counts.items():
                        counts[...] = content[f"{name}/{k}"]
                return header["done"], header["costs"]
    except Exception as error:  # zip, JSON and NumPy raise different errors
        warn(f"{file}: cannot be read ({type(error).__name__}); counts start again")
        for part in parts.values():
            for counts in part.counts.values():
                counts[...] = 0
    return 0, None


def measure_cost(ready: LoadedDetector, data: EvaluationData) -> dict[str, float | None]:
    """Measure the median time of inference on one image, and its peak memory without the weights."""
    batches = list(build_loader(ready.detector, data.records[:NUM_TIMED]))
    device = ready.teacher.detector.device

    def detect(batch: list[dict]) -> None:
        with torch.no_grad():
            ready.teacher.detect(batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    detect(batches[0])  # warm-up
    seconds = []
    for batch in batches:
        start = time.perf_counter()
        detect(batch)
        seconds.append(time.perf_counter() - start)
    memory = []
    for batch in batches[:NUM_MEMORY]:
        peak = PeakMemory(device)
        detect(batch)
        memory.append(peak.growth)
    known = [m for m in memory if m is not None]
    return {
        "seconds": float(np.median(seconds)),
        "memory_mib": max(known) / 2**20 if known else None,
    }
