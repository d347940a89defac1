"""Detections of a whole data set, computed once, kept, and gone on with where it stopped.

A detector's folder has a file for each :data:`PART` images, whole or absent. Each names what it was made from (weights,
config, data set); one that names something else or cannot be read is computed anew, and said so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from ..modeling.teacher import in_students_classes
from ..utils.errors import InputError
from ..utils.io import written_whole
from .accuracy import accuracy
from .detectors import Data, Detector, Ready, loader_of, read_results
from .matching import Detections, match

PART = 200
"""Images in a file."""
SCHEMA = 1

Report = Callable[[int, int], None]
"""Told (images done, images)."""
Say = Callable[[str], None]
"""Told a line about what did not go as expected."""


def detections_of(
    ready: Ready,
    data: Data,
    folder: Path,
    report: Report,
    say: Say,
) -> Detections:
    """What a detector says about a data set: read where that is known, else computed and kept.

    Args:
        ready: the detector.
        data: the data set.
        folder: where this detector's files are.
        report: told the images done.
        say: told what was computed anew, and why.

    Raises:
        InputError: a file that must fit does not, or an image cannot be read.
    """
    detector = ready.detector
    for path in detector.results:
        try:
            known = _known(path, detector, data)
        except InputError as error:
            if detector.must_fit:
                raise
            if path.exists():
                say(f"{error}; detected anew")
            continue
        images = len(np.unique(known.image))
        if 2 * images < len(data.records):
            say(f"{path}: detections on {images} of {len(data.records)} images alone")
        return known
    key = {"schema": SCHEMA, "dataset": data.name, "dataset_sha256": data.sha256, **detector.key}
    begins = range(0, len(data.records), PART)
    parts, missing = {}, []
    for begin in begins:
        parts[begin] = _read(folder / f"{begin:06d}.npz", key, say)
        if parts[begin] is None:
            missing.append(begin)
    report(len(data.records) - sum(_length(b, data) for b in missing), len(data.records))
    for begin in missing:
        done = sum(_length(b, data) for b in parts if parts[b] is not None)
        parts[begin] = _detect(
            ready,
            data,
            data.records[begin : begin + PART],
            lambda n, done=done: report(done + n, len(data.records)),
        )
        _write(folder / f"{begin:06d}.npz", key, parts[begin])
    return joined(list(parts.values()))


def _length(begin: int, data: Data) -> int:
    return min(PART, len(data.records) - begin)


def _known(path: Path, detector: Detector, data: Data) -> Detections:
    """A results file, if it has the AP that it should."""
    found = read_results(path, data)
    if detector.expected_AP is not None:
        everything = range(len(data.truth.classes))
        ap = accuracy(data.truth, match(data.truth, found), everything, 0.5).metrics["AP"]
        if ap is None or abs(ap - detector.expected_AP) > 1e-6:
            expected = f"{detector.expected_AP:.3f}, as the study found"
            raise InputError(path, f"AP {'undefined' if ap is None else f'{ap:.3f}'}", expected)
    return found


def joined(parts: Sequence[Detections]) -> Detections:
    """Several as one."""
    return Detections(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0]))
    )


def _detect(
    ready: Ready, data: Data, records: list[dict], report: Callable[[int], None]
) -> Detections:
    loader = loader_of(ready.detector, records)
    images, labels, boxes, scores = [], [], [], []
    for number, (record, batch) in enumerate(zip(records, loader), 1):
        with torch.no_grad():
            [seen] = ready.teacher.detect(batch)
        found = in_students_classes(seen["instances"].to("cpu"), ready.map)
        xyxy = found.pred_boxes.tensor.numpy()
        # XYWH in single precision, as COCOEvaluator writes it.
        boxes.append(np.concatenate([xyxy[:, :2], xyxy[:, 2:] - xyxy[:, :2]], axis=1))
        labels.append(found.pred_classes.numpy())
        scores.append(found.scores.numpy())
        images.append(np.full(len(labels[-1]), data.place[record["image_id"]], dtype=np.int64))
        report(number)
    return Detections(
        image=np.concatenate(images),
        label=np.concatenate(labels).astype(np.int64),
        box=np.concatenate(boxes).astype(np.float64).reshape(-1, 4),
        score=np.concatenate(scores).astype(np.float64),
    )


def _write(path: Path, key: dict, detections: Detections) -> None:
    with written_whole(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, key=json.dumps(key, sort_keys=True), **vars(detections))


def _read(path: Path, key: dict, say: Say) -> Detections | None:
    """The detections in a file; None if there is none, or another's, or nothing that can be read."""
    if not path.is_file():
        return None
    try:
        with np.load(path) as content:
            found = json.loads(str(content["key"]))
            if found == key:
                return Detections(*(content[name] for name in ("image", "label", "box", "score")))
    except Exception as error:  # zip, pickle and NumPy each fail in their own way
        say(f"{path}: cannot be read ({type(error).__name__}); detected anew")
        return None
    other = ", ".join(name for name in key if found.get(name) != key[name])
    say(f"{path}: of another {other.replace('_sha256', '')}; detected anew")
    return None
