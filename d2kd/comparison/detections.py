"""Detections on a whole data set, cached on disk. An interrupted computation is resumed.

Each detector has a folder with one file per :data:`IMAGES_PER_FILE` images, written atomically. A file holds a key: the hashes of
weights, config and data set. A file with another key, or that cannot be read, is computed again with a warning.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..structures.rle import encode_masks, object_array
from ..utils.console import ProgressCallback
from ..utils.errors import InputError
from ..utils.io import atomic_write
from .accuracy import compute_accuracy
from .detectors import Detector, EvaluationData, LoadedDetector, build_loader, load_coco_results
from .matching import Detections, match_detections

IMAGES_PER_FILE = 200
"""Number of images per file."""
SCHEMA = 2
FIELDS = ("image", "label", "box", "score")  # of Detections, besides masks

Warn = Callable[[str], None]
"""Callback for warnings, called with one line of text."""


def get_detections(
    ready: LoadedDetector,
    data: EvaluationData,
    folder: Path,
    progress: ProgressCallback,
    warn: Warn,
) -> Detections:
    """Return the detections of a detector on a data set, from a results file or the cache where possible.

    Args:
        ready: the detector.
        data: the data set.
        folder: cache folder of this detector.
        progress: progress callback.
        warn: callback for warnings, such as that cached detections are computed again.

    Raises:
        InputError: a results file that must fit does not, or an image cannot be read.
    """
    detector = ready.detector
    for path in detector.results:
        try:
            known = _known(path, detector, data)
        except InputError as error:
            if detector.strict:
                raise
            if path.exists():
                warn(f"{error}; detections are computed again")
            continue
        images = len(np.unique(known.image))
        if 2 * images < len(data.records):
            warn(f"{path}: detections on only {images} of {len(data.records)} images")
        return known
    key = {"schema": SCHEMA, "dataset": data.name, "dataset_sha256": data.sha256, **detector.key}
    total, parts, missing = len(data.records), {}, {}
    for begin in range(0, total, IMAGES_PER_FILE):
        file = folder / f"{begin:06d}.npz"
        parts[file] = _read(file, key, warn)
        if parts[file] is None:
            missing[file] = data.records[begin : begin + IMAGES_PER_FILE]
    done = total - sum(map(len, missing.values()))
    progress(done, total)
    for file, records in missing.items():
        parts[file] = _detect(ready, data, records, lambda n, done=done: progress(done + n, total))
        _write(file, key, parts[file])
        done += len(records)
    columns = ([getattr(part, name) for part in parts.values()] for name in FIELDS)
    masks = [part.mask for part in parts.values()]
    masks = None if any(mask is None for mask in masks) else np.concatenate(masks)
    return Detections(*map(np.concatenate, columns), masks)


def _known(path: Path, detector: Detector, data: EvaluationData) -> Detections:
    """Load a results file and check its AP."""
    found = load_coco_results(path, data)
    if detector.expected_AP is not None:
        everything = range(len(data.truth.classes))
        ap = compute_accuracy(
            data.truth, match_detections(data.truth, found), everything, 0.5
        ).metrics["AP"]
        if ap is None or abs(ap - detector.expected_AP) > 1e-6:
            expected = f"{detector.expected_AP:.3f}, the AP in the study"
            raise InputError(path, f"AP {'undefined' if ap is None else f'{ap:.3f}'}", expected)
    return found


def _detect(
    ready: LoadedDetector,
    data: EvaluationData,
    records: list[dict],
    progress: Callable[[int], None],
) -> Detections:
    loader = build_loader(ready.detector, records)
    images, labels, boxes, scores = [], [], [], []
    masks: list[dict] | None = []
    for number, (record, batch) in enumerate(zip(records, loader), 1):
        found = ready.detect(batch)
        xyxy = found.pred_boxes.tensor.numpy()
        # XYWH, computed in float32 as COCOEvaluator does.
        boxes.append(np.concatenate([xyxy[:, :2], xyxy[:, 2:] - xyxy[:, :2]], axis=1))
        labels.append(found.pred_classes.numpy())
        scores.append(found.scores.numpy())
        if not found.has("pred_masks"):
            masks = None
        elif masks is not None:
            masks += encode_masks(found.pred_masks)
        images.append(np.full(len(labels[-1]), data.index_of[record["image_id"]], dtype=np.int64))
        progress(number)
    return Detections(
        image=np.concatenate(images),
        label=np.concatenate(labels).astype(np.int64),
        box=np.concatenate(boxes).astype(np.float64).reshape(-1, 4),
        score=np.concatenate(scores).astype(np.float64),
        mask=None if masks is None else object_array(masks),
    )


def _write(path: Path, key: dict, detections: Detections) -> None:
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        content = {name: getattr(detections, name) for name in FIELDS}
        if detections.mask is not None:
            content["mask"] = json.dumps(detections.mask.tolist())
        np.savez_compressed(file, key=json.dumps(key, sort_keys=True), **content)


def _read(path: Path, key: dict, warn: Warn) -> Detections | None:
    """Read a cache file; None if it is missing, has another key, or cannot be read."""
    if not path.is_file():
        return None
    try:
        with np.load(path) as content:
            found = json.loads(str(content["key"]))
            if found == key:
                mask = None
                if "mask" in content:
                    mask = object_array(json.loads(str(content["mask"])))
                return Detections(*(content[name] for name in FIELDS), mask)
    except Exception as error:  # zip, pickle and NumPy raise different errors
        warn(f"{path}: cannot be read ({type(error).__name__}); detections are computed again")
        return None
    other = ", ".join(name for name in key if found.get(name) != key[name])
    warn(f"{path}: differs in {other.replace('_sha256', '')}; detections are computed again")
    return None
