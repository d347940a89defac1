"""Labels from a detector: its detections as a COCO-style file, to train another detector with (pseudo-labels)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..data import check_dataset
from ..data.images import SUFFIXES, find_images
from ..utils.console import ProgressCallback
from ..utils.errors import InputError
from ..utils.io import read_json, write_json
from .detectors import Detector, build_loader, load_detector_for_classes, set_default_mapper


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
        return cls(str(folder), [{"file_name": str(f), "image_id": i} for i, f in enumerate(files)])

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


def write_labels(
    file: str | Path,
    detector: Detector,
    images: UnlabelledImages,
    min_score: float,
    device: torch.device,
    progress: ProgressCallback,
) -> dict:
    """Write the detections of a detector as a COCO-style file for :func:`d2kd.data.coco_dataset`, atomically.

    The ``image_root`` of the file is the images' :attr:`~UnlabelledImages.root`. It lists all images, also those
    without a detection; a dataset node's ``filter_empty`` says whether they are used for training. Its categories are
    the classes of the data set, or those of the detector. An annotation has the detection's box and ``score``, its
    ``area`` is that of the box, and ``iscrowd`` is 0. Masks are not written.

    Args:
        file: the file.
        detector: the detector.
        images: the images.
        min_score: minimum score of detections, in [0, 1].
        device: device of the detector.
        progress: called with the number of finished and of all images.

    Returns:
        dict: the content of the file.

    Raises:
        InputError: the score is invalid, the detector cannot be used, or an image cannot be read.
    """
    check_min_score("min_score", min_score)
    set_default_mapper([detector])
    ready = load_detector_for_classes(detector, images.name, images.classes, device)
    classes = ready.class_map.student
    category_ids = images.category_ids or tuple(range(1, len(classes) + 1))
    ids = [record.get("image_id") for record in images.records]
    if not all(isinstance(i, int) for i in ids):  # Pascal VOC's are names
        ids = range(1, len(ids) + 1)
    entries, annotations, total = [], [], len(images.records)
    progress(0, total)
    loader = build_loader(detector, images.records)
    for image_id, name, batch in zip(ids, images.relative_files, loader):
        found = ready.detect(batch)
        found = found[found.scores >= min_score]
        height, width = found.image_size
        entries.append({"id": image_id, "file_name": name, "width": width, "height": height})
        rows = zip(found.pred_boxes.tensor.tolist(), found.pred_classes, found.scores.tolist())
        for (x0, y0, x1, y1), label, score in rows:
            box = [round(value, 3) for value in (x0, y0, x1 - x0, y1 - y0)]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_ids[label],
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                    "score": score,
                }
            )
        progress(len(entries), total)
    content = {
        "info": {
            "description": "detections as labels",
            "images": images.name,
            "min_score": min_score,
            "config": detector.config,
            **detector.key,
        },
        "images": entries,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in zip(category_ids, classes)],
    }
    write_json(file, content)
    return content


def read_labels(file: str | Path, images: UnlabelledImages) -> dict | None:
    """Return the content of a file that :func:`write_labels` has written for these images; None if there is none."""
    content = read_json(file)
    listed = [one["file_name"] for one in content.get("images", ())]
    return content if listed == images.relative_files else None


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
