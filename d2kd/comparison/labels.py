"""Labels from a detector: its detections as a COCO-style file, to train another detector with (pseudo-labels)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pycocotools.mask as mask_util
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from tabulate import tabulate

from .. import __version__
from ..data import check_dataset
from ..data.images import SUFFIXES, find_images
from ..structures.class_map import ClassMap
from ..structures.rle import encode_masks
from ..utils.console import ProgressCallback
from ..utils.errors import InputError
from ..utils.io import read_json, report_full_disk, write_text
from .accuracy import class_operating_point
from .detections import Warn, get_detections
from .detectors import EvaluationData, LoadedDetector, build_loader, file_version
from .matching import match_detections

logger = logging.getLogger(__name__)

SCHEMA = 1  # of partial files


@dataclass(frozen=True)
class UnlabelledImages:
    """Images to be labelled; annotations that they have are not used.

    Attributes:
        name: name of the data set, or the folder.
        records: dataset dicts of Detectron2.
        classes: class names; None: those of the detector.
        category_ids: COCO category id of each class; None: from 1.

    Raises:
        InputError: there is no image.
    """

    name: str
    records: list[dict]
    classes: tuple[str, ...] | None = None
    category_ids: tuple[int, ...] | None = None

    def __post_init__(self):
        if not self.records:
            raise InputError(
                self.name, "no image", f"at least one; in a folder *{', *'.join(SUFFIXES)}"
            )

    @classmethod
    def from_dataset(cls, name: str) -> UnlabelledImages:
        """Load a registered data set."""
        check_dataset(name)
        records, metadata = DatasetCatalog.get(name), MetadataCatalog.get(name)
        classes = metadata.get("thing_classes")
        ids = metadata.get("thing_dataset_id_to_contiguous_id")
        return cls(
            name,
            records,
            None if classes is None else tuple(classes),
            None if ids is None else tuple(sorted(ids, key=ids.get)),
        )

    @classmethod
    def from_folder(cls, folder: Path) -> UnlabelledImages:
        """Find the images in a folder and the folders in it, by their suffixes."""
        files = find_images(folder)
        return cls(
            str(folder), [{"file_name": str(f), "image_id": i} for i, f in enumerate(files, 1)]
        )

    @cached_property
    def files(self) -> list[str]:
        return [os.path.abspath(record["file_name"]) for record in self.records]

    @cached_property
    def root(self) -> str:
        """The folder that contains all images, in it or in the folders in it."""
        return os.path.commonpath([os.path.dirname(file) for file in self.files])

    @property
    def relative_files(self) -> list[str]:
        """Paths of the images in :attr:`root`."""
        return [os.path.relpath(file, self.root) for file in self.files]

    @property
    def sha256(self) -> str:
        """Hash of what their labels depend on: ids, and names, sizes and times of the files."""
        ids = [record.get("image_id") for record in self.records]
        versions = [file_version(file) for file in self.files]
        return hashlib.sha256(repr((ids, self.category_ids, versions)).encode()).hexdigest()


@dataclass(frozen=True)
class Thresholds:
    """The minimum scores of labels.

    Attributes:
        min_scores: class name -> minimum score, in [0, 1]; None: labels of the class are left out.
        measured: class name -> what :func:`.accuracy.class_operating_point` returns for it; empty: not measured.
        chosen: ``dataset`` and ``dataset_sha256`` of the labelled data on which scores were chosen, and the minimum
            ``precision``, which is None for the highest F1; None: all are given.
    """

    min_scores: dict[str, float | None]
    measured: dict[str, dict[str, float | None]] = field(default_factory=dict)
    chosen: dict[str, Any] | None = None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """For each class its ``class``, ``min_score``, ``precision``, ``recall`` and ``f1`` in [0, 1], and ``objects``."""
        rows = []
        for name, score in self.min_scores.items():
            point = self.measured.get(name, {})
            row = {"class": name, "min_score": score}
            for key in ("precision", "recall", "f1"):
                value = None if score is None else point.get(key)
                row[key] = None if value is None else round(value / 100, 4)
            rows.append(row | {"objects": point.get("objects")})
        return rows

    @property
    def left_out(self) -> dict[str, str]:
        """The reason why a class is left out, for each such class."""
        reasons = {}
        for name in (name for name, score in self.min_scores.items() if score is None):
            if not self.measured.get(name, {}).get("objects"):
                reasons[name] = f"no object in {self.chosen['dataset']}"
            elif self.chosen["precision"] is None:
                reasons[name] = "no detection is right"
            else:
                reasons[name] = f"no score has a precision of {self.chosen['precision']}"
        return reasons

    def __str__(self) -> str:
        """Return a table, and the reasons why classes are left out."""
        head = ["class", "min. score", "precision", "recall", "F1", "objects"]
        table = tabulate(
            [list(row.values()) for row in self.rows], head, floatfmt=".3f", missingval="-"
        )
        return "\n".join(
            [table, *(f"left out: {name}: {why}" for name, why in self.left_out.items())]
        )


def given_thresholds(
    classes: Sequence[str], default: float, given: Mapping[str, float] | None = None
) -> Thresholds:
    """Return the thresholds of some classes, with a default for the others."""
    given = given or {}
    return Thresholds({name: given.get(name, default) for name in classes})


def choose_thresholds(
    ready: LoadedDetector,
    data: EvaluationData,
    folder: Path,
    progress: ProgressCallback,
    precision: float | None = None,
    default: float | None = None,
    given: Mapping[str, float] | None = None,
    warn: Warn = logger.warning,
) -> Thresholds:
    """Choose the minimum score of each class of the labels on labelled data, where matches have an IoU of at least 0.5.

    Args:
        ready: the detector, with the classes of the labels.
        data: the labelled data. Their classes are matched with those of the labels by name.
        folder: cache of the detections, by which an interrupted computation is resumed.
        progress: called with the number of finished and of all images.
        precision: minimum precision in (0, 1], reached by the lowest score. None: the score of the highest F1.
        default: score of a class for which none can be chosen: the data have no object of it, no score reaches the
            precision, or no detection is right. None: the class is left out.
        given: class name -> score that is not chosen.
        warn: called with one line of text.

    Raises:
        InputError: all classes are left out, or an image cannot be read.
    """
    classes, given = ready.class_map.student, given or {}
    on_data = replace(
        ready, class_map=ClassMap.from_names(data.truth.classes, ready.class_map.teacher)
    )
    matches = match_detections(data.truth, get_detections(on_data, data, folder, progress, warn))
    point_of = partial(class_operating_point, data.truth, matches)
    scores: dict[str, float | None] = {name: given.get(name, default) for name in classes}
    measured = {}
    for k, own in ClassMap.from_names(classes, data.truth.classes).pairs:
        name = classes[k]
        point = point_of(own, precision, given.get(name))
        if point["threshold"] is None and default is not None:
            point = point_of(own, threshold=default)
        scores[name], measured[name] = point["threshold"], point
    chosen = {"dataset": data.name, "dataset_sha256": data.sha256, "precision": precision}
    thresholds = Thresholds(scores, measured, chosen)
    if len(left_out := thresholds.left_out) == len(classes):
        name, reason = next(iter(left_out.items()))
        expected = "another data set, a lower precision, or given scores"
        raise InputError(data.name, f"every class is left out, such as {name}: {reason}", expected)
    return thresholds


def write_labels(
    file: str | Path,
    ready: LoadedDetector,
    images: UnlabelledImages,
    thresholds: Thresholds,
    progress: ProgressCallback,
    warn: Warn = logger.warning,
) -> dict:
    """Write the detections of a detector as a COCO-style file for :func:`d2kd.data.coco_dataset`, atomically.

    The ``image_root`` of the file is the images' :attr:`~UnlabelledImages.root`. It lists all images that can be read,
    also those without a detection; a dataset node's ``filter_empty`` says whether they are used for training. Its
    categories are the classes for which the detector was loaded. An annotation has the detection's box and ``score``,
    ``iscrowd`` is 0, and ``segmentation`` is the detector's mask as RLE, or empty without one. ``area`` is that of the mask
    or, without one, of the box. ``info`` says how they were made.

    Finished images are kept in ``<file>.partial`` until all are. An interrupted call that is repeated continues from
    there, and its file equals that of a call that was not interrupted. Images go through the detector one by one,
    because padding to the largest of a batch may change detections.

    Args:
        file: the file.
        ready: the detector, loaded for the classes of the labels.
        images: the images.
        thresholds: minimum scores.
        progress: called with the number of finished and of all images.
        warn: called with one line of text, if the partial file is of other labels and not used.

    Returns:
        dict: the content of the file. Its ``info`` has ``unreadable``, the image files that cannot be read, each with the
        reason; and ``detections_of_other_classes``, the number of those from the lowest minimum score on.

    Raises:
        InputError: no image can be read, or the disk is full.
    """
    file, records = Path(file), images.records
    classes = ready.class_map.student
    scores = [thresholds.min_scores[name] for name in classes]
    key = {
        "schema": SCHEMA,
        "d2kd": __version__,
        **{f"detector's {name}": value for name, value in ready.detector.key.items()},
        "classes": list(classes),
        "minimum scores": scores,
        "images": images.sha256,
    }
    partial = file.with_name(f"{file.name}.partial")
    with report_full_disk(file, "the same command"):
        rows = _begin(partial, key, warn)
        progress(len(rows), len(records))
        with open(partial, "a", encoding="utf-8") as lines:
            for row in _rows(ready, records[len(rows) :], scores):
                lines.write(json.dumps(row) + "\n")
                lines.flush()  # so that it outlives this process
                rows.append(row)
                progress(len(rows), len(records))
        content = _content(ready, images, thresholds, rows)
        if content["images"]:
            write_text(file, json.dumps(content, allow_nan=False) + "\n")
    partial.unlink()
    if not content["images"]:
        first, *_ = content["info"]["unreadable"]
        found = f"none of {len(rows)} images can be read: {first['file_name']} {first['reason']}"
        raise InputError(images.name, found, "at least one image")
    return content


def _begin(partial: Path, key: dict, warn: Warn) -> list[dict]:
    """Return the finished images of a partial file, and cut off a line that a killed process has not finished.

    If there is no such file, or it is of other labels, a new one is begun.
    """
    lines, end = [], 0
    with contextlib.suppress(OSError, ValueError), open(partial, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                lines.append(json.loads(line))
                end += len(line)
    head = lines[0] if lines and isinstance(lines[0], dict) else {}
    if head == key:
        os.truncate(partial, end)
        return lines[1:]
    if partial.exists():
        other = ", ".join(name for name in key if head.get(name) != key[name])
        warn(f"{partial}: of other labels ({other}); all images are labelled anew")
    write_text(partial, json.dumps(key) + "\n")
    return []


def _rows(
    ready: LoadedDetector, records: list[dict], min_scores: Sequence[float | None]
) -> Iterator[dict]:
    """Yield the labels of each image, or the reason why it cannot be read."""
    if not records:
        return
    # In the precision of JSON's numbers, so that a score that was chosen passes itself.
    least = torch.tensor([math.inf if s is None else s for s in min_scores], dtype=torch.float64)
    class_map = ready.class_map
    for [sample] in build_loader(ready.detector, records, raise_errors=False):
        if isinstance(sample, InputError):
            yield {"unreadable": sample.found}
            continue
        found = ready.detect_own_classes([sample])
        labels, scores = class_map.labels_to_student(found.pred_classes), found.scores.double()
        kept = (labels >= 0) & (scores >= least[labels])
        others = (labels < 0) & (scores >= least.min())
        height, width = found.image_size
        masks = {}
        if found.has("pred_masks"):
            masks["masks"] = encode_masks(found.pred_masks[kept])
        near, far = found.pred_boxes.tensor[kept].double().split(2, dim=1)
        yield {
            "size": [width, height],
            "boxes": [
                [round(v, 3) for v in box] for box in torch.cat([near, far - near], 1).tolist()
            ],
            "labels": labels[kept].tolist(),
            "scores": scores[kept].tolist(),
            "other_classes": int(others.sum()),
            **masks,
        }


def _content(
    ready: LoadedDetector, images: UnlabelledImages, thresholds: Thresholds, rows: list[dict]
) -> dict:
    """Return the content of the file, from the labels of each image."""
    classes = ready.class_map.student
    category_ids = images.category_ids or tuple(range(1, len(classes) + 1))
    ids = [record.get("image_id") for record in images.records]
    if not all(isinstance(i, int) for i in ids):  # Pascal VOC's are names
        ids = range(1, len(ids) + 1)
    entries, annotations, unreadable = [], [], []
    for image_id, name, row in zip(ids, images.relative_files, rows):
        if "unreadable" in row:
            unreadable.append({"file_name": name, "reason": row["unreadable"]})
            continue
        width, height = row["size"]
        entries.append({"id": image_id, "file_name": name, "width": width, "height": height})
        masks = row.get("masks", [None] * len(row["boxes"]))
        for box, label, score, mask in zip(row["boxes"], row["labels"], row["scores"], masks):
            area = box[2] * box[3] if mask is None else int(mask_util.area(mask))
            # Not of a box that is rounded to nothing, or of a mask without a pixel.
            if box[2] * box[3] * area:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": category_ids[label],
                        "bbox": box,
                        "area": area,
                        "iscrowd": 0,
                        "segmentation": mask or [],
                        "score": score,
                    }
                )
    about = {
        "description": "detections as labels",
        "d2kd": __version__,
        "images": images.name,
        "detector": ready.detector.config,
        **ready.detector.key,
        "thresholds": thresholds.rows,
        "chosen": thresholds.chosen,
        "unreadable": unreadable,
        "detections_of_other_classes": sum(row.get("other_classes", 0) for row in rows),
    }
    return {
        "info": about,
        "images": entries,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in zip(category_ids, classes)],
    }


def read_labels(file: str | Path, images: UnlabelledImages) -> dict | None:
    """Return the content of a file that :func:`write_labels` has written for these images; None if there is none."""
    content = read_json(file)
    unreadable = {one["file_name"] for one in content.get("info", {}).get("unreadable", ())}
    listed = [one["file_name"] for one in content.get("images", ())]
    readable = [name for name in images.relative_files if name not in unreadable]
    return content if listed and listed == readable else None


def check_min_score(culprit: str, value: float) -> None:
    """Raise InputError unless a value is a score."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InputError(culprit, value, "a score from 0 to 1")


def training_images(counts: Iterable[tuple[str, int | None, int | None]]) -> str:
    """Say on how many images detectors were trained; an empty text if the numbers are equal, or one is unknown.

    Args:
        counts: name, number of training images, and number of those labelled by a detector; a name may be repeated.
    """
    groups: dict[tuple[int | None, int], dict[str, None]] = {}
    for name, images, labelled in counts:
        groups.setdefault((images, labelled or 0), {})[name] = None
    if len(groups) < 2 or any(images is None for images, _ in groups):
        return ""
    parts = [
        f"{', '.join(names)} {images:,}"
        + (f", {labelled:,} of them with a detector's labels" if labelled else "")
        for (images, labelled), names in groups.items()
    ]
    return f"Trained on different numbers of images: {'; '.join(parts)}."


def count_labels(content: dict) -> str:
    """Return the number of images and boxes of a file as text."""
    images, boxes = content["images"], content["annotations"]
    empty = len(images) - len({one["image_id"] for one in boxes})
    return f"{len(images)} images, {len(boxes)} boxes, {empty} images without any"
