"""Checks of data sets: unreadable images, copies of images, images without objects, boxes outside their images."""

from __future__ import annotations

import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog, detection_utils
from detectron2.structures import BoxMode
from omegaconf import DictConfig

from ..data import check_dataset
from ..data.catalog import file_digest
from ..data.datasets import (
    check_same_classes,
    dataset_names,
    image_files,
    labelled_names,
    sample_evenly,
    shared_images,
)
from ..data.images import check_image, read_image
from ..utils.errors import InputError
from .findings import Finding, guarded

BOX_MARGIN = 1.0  # pixels by which a box may exceed the image: annotations are often rounded
MAX_BAD_BOXES = 0.01  # fraction of bad boxes from which they are an error
LEAST_BOXES = 10  # from which their format is guessed
MIN_DEVIATION = 2.0  # standard deviation of pixels, of 255, below which an image shows nothing
MAX_REACH = 0.55  # fraction of their image up to which all boxes lie in its corner: percent, or another image size
COPY_SECONDS = 30  # for the search of image files with the same content
MAX_EMPTY_IMAGES = 0.5  # fraction of images without objects above which there is a warning


def check_data(config: DictConfig, images: int, debug: bool = False) -> Iterator[Finding]:
    """Check the training and the test data.

    Args:
        config: a complete recipe.
        images: number of images to decode from each, evenly spaced; 0: all.
        debug: whether to raise the error of a check that fails, instead of yielding it as a finding.
    """

    def checked_part(subject: str, check: Callable, *args: Any) -> Iterator[Finding]:
        return guarded(subject, lambda: check(*args), debug=debug)

    checked = {}
    for part in ("train", "test"):
        try:
            names = checked[part] = check_dataset(dataset_names(config, part))
        except InputError as error:
            advice = f"{error.expected}"
            yield Finding(f"{part} data", "error", f"{error.culprit}: {error.found}", advice)
            continue
        if not names:
            yield Finding(f"{part} data", "ok", "no names of data sets")
            continue
        of_set = {name: DatasetCatalog.get(name) for name in names}
        records = [record for name in names for record in of_set[name]]
        labelled = labelled_names(names)
        for oddity in (o for name in names for o in MetadataCatalog.get(name).get("oddities", ())):
            yield Finding(f"{part} data, file", "warning", oddity, "correct it, if it is not meant")
        lost = sum(MetadataCatalog.get(name).get("num_left_out", 0) for name in names)
        kept = sum(len(record.get("annotations") or ()) for record in records)
        if lost and lost >= MAX_BAD_BOXES * (lost + kept):
            found = f"{lost} of {lost + kept} are left out: no area in their image"
            advice = "[x, y, width, height] in pixels of the image, and its width and height"
            yield Finding(f"{part} data, boxes left out", "error", found, advice)
        if labelled:
            classes = _annotated_classes(MetadataCatalog.get(labelled[0]))
            annotated = [record for name in labelled for record in of_set[name]]
            subject = f"{part} data"
            yield from checked_part(subject, _check_annotations, subject, annotated, classes)
        if unlabelled := sum(len(of_set[name]) for name in names if name not in labelled):
            found = f"{unlabelled} images, for distillation alone"
            yield Finding(f"{part} data, unlabelled", "ok", found)
        subject = f"{part} images"
        yield from checked_part(subject, _check_images, subject, records, images)
    if len(checked) == 2:
        yield from checked_part("both data", _compare, *checked.values())


def _compare(train: list[str], test: list[str]) -> Iterator[Finding]:
    try:
        check_same_classes(labelled_names(train), test)
    except InputError as error:
        yield Finding(
            "classes of the data", "error", f"{error.culprit}: {error.found}", error.expected
        )
    if shared := shared_images(train, test):
        found = f"{len(shared)} test images are training images, too, such as {shared[0]}"
        yield Finding(
            "test images", "warning", found, "leave them out of one: their AP says little"
        )

    yield from _check_copies(
        *([file for name in names for file in image_files(name)] for names in (train, test))
    )


def _check_copies(train: Sequence[str], test: Sequence[str]) -> Iterator[Finding]:
    """Find image files with the same content: training images, and test images that training has, too."""
    start, in_training = time.monotonic(), set(train)
    by_size: dict[int, list[str]] = defaultdict(list)
    for file in dict.fromkeys([*train, *test]):
        with contextlib.suppress(OSError):  # not a local file
            by_size[os.path.getsize(file)].append(file)
    candidates = [
        file for size, files in by_size.items() if size and len(files) > 1 for file in files
    ]
    first: dict[str, str] = {}
    copies: dict[bool, list[tuple[str, str]]] = {True: [], False: []}
    limit = ""
    for number, file in enumerate(candidates):
        if time.monotonic() - start > COPY_SECONDS:
            limit = f", as far as {COPY_SECONDS} s allow: {number} of {len(candidates)} files of equal size were read"
            break
        with open(file, "rb") as opened:
            original = first.setdefault(file_digest(opened.read()), file)
        if original != file and original in in_training:
            copies[file in in_training].append((file, original))
    if not any(copies.values()):
        yield Finding("copies of images", "ok", f"none{limit}")
    for within, advice in (
        (True, "leave them out, if they are not meant"),
        (False, "leave them out of one: their AP says little"),
    ):
        if copies[within]:
            what = (
                "training images are copies of others"
                if within
                else "test images are copies of training images"
            )
            found = (
                f"{len(copies[within])} {what}, such as {' and '.join(copies[within][0])}{limit}"
            )
            yield Finding("copies of images", "warning", found, advice)


def _annotated_classes(metadata: Metadata) -> dict[int, str]:
    """Return the annotated classes, class index -> name; those of an increment are a subset."""
    part, names = metadata.get("incremental_split"), metadata.get("thing_classes") or []
    if part is None:
        return dict(enumerate(names))
    return {k: name for name, k in part.class_ids.items()}


def _check_annotations(
    subject: str, records: Sequence[dict], classes: Mapping[int, str]
) -> Iterator[Finding]:
    rows, empty = [], 0
    for record in records:
        objects = [one for one in record.get("annotations", ()) if not one.get("iscrowd", 0)]
        empty += not objects
        for one in objects:
            box = BoxMode.convert(one["bbox"], one["bbox_mode"], BoxMode.XYXY_ABS)
            size = [record.get("width", np.inf), record.get("height", np.inf)]
            rows.append([*box, *size, one["category_id"]])
    found = f"{len(records)} images, {len(rows)} objects"
    if not rows:
        yield Finding(subject, "error", found, "annotations; without any nothing is learned")
        return
    state = "warning" if empty > MAX_EMPTY_IMAGES * len(records) else "ok"
    advice = "leave them out (of a dataset node: filter_empty=True), if they are not meant"
    yield Finding(subject, state, f"{found}, {empty} images without any", advice * (state != "ok"))

    values = np.asarray(rows, dtype=float)
    box, size, category = values[:, :4], values[:, 4:6], values[:, 6].astype(int)
    outside = ((box[:, :2] < -BOX_MARGIN) | (box[:, 2:] > size + BOX_MARGIN)).any(axis=1)
    flat = (box[:, 2:] <= box[:, :2]).any(axis=1)
    bad = int((outside | flat).sum())
    meant = _other_format(box, size)
    if meant:
        found = f"as if they were {meant}"
        advice = "[x, y, width, height] in pixels, of the upper left corner"
        yield Finding(f"{subject}, boxes", "error", found, advice)
    elif bad:
        state = "error" if bad >= MAX_BAD_BOXES * len(rows) else "warning"
        found = (
            f"{int(outside.sum())} boxes lie outside their image, {int(flat.sum())} have no area"
        )
        advice = "correct the annotations: such boxes are clipped or dropped without a warning"
        yield Finding(f"{subject}, boxes", state, found, advice)
    elif thin := int((box[:, 2:] - box[:, :2] < 1).any(axis=1).sum()):
        found = f"{thin} boxes are less than a pixel wide or high"
        advice = "boxes in pixels, not in fractions of the image"
        yield Finding(f"{subject}, boxes", "warning", found, advice)
    elif len(box) >= LEAST_BOXES and (box[:, 2:] <= MAX_REACH * size).all():
        found = f"none reaches beyond {MAX_REACH:.0%} of its image's width and height"
        advice = "boxes in pixels of the image file, not in percent or of a smaller image"
        yield Finding(f"{subject}, boxes", "warning", found, advice)
    else:
        yield Finding(f"{subject}, boxes", "ok", "all inside their images")
    missing = [name for k, name in classes.items() if not (category == k).any()]
    if missing:
        found = f"no object of {', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}"
        yield Finding(f"{subject}, classes", "warning", found, "leave them out, or add examples")


def _other_format(box: np.ndarray, size: np.ndarray) -> str | None:
    """Return what boxes (XYXY, M x 4) look like, if they do not fit into images (M x 2) and would as something else."""
    first, last = box[:, :2], box[:, 2:]
    sides = last - first
    if (np.abs([first, sides]) <= 1).all() and (box != box.round()).any():
        return "fractions of the image's sides"
    if len(box) < LEAST_BOXES or (last > size + BOX_MARGIN).any(axis=1).mean() < MAX_BAD_BOXES:
        return None
    if (sides > first).all() and (sides <= size + BOX_MARGIN).all():
        return "[x0, y0, x1, y1], two corners"
    centred = (first - sides / 2 >= -BOX_MARGIN) & (first + sides / 2 <= size + BOX_MARGIN)
    return "[centre x, centre y, width, height]" if centred.all() else None


def _check_images(subject: str, records: Sequence[dict], images: int) -> Iterator[Finding]:
    chosen = sample_evenly(records, images or len(records))
    bad, turned, uniform = [], [], []
    for record in chosen:
        name = record.get("file_name")
        try:
            if check_image(name) != 1:
                turned.append(name)
            image = read_image(name, "BGR")
            detection_utils.check_image_size(dict(record), image)
            if image.std() < MIN_DEVIATION:
                uniform.append(name)
        except detection_utils.SizeMismatchError:
            bad.append(f"{name} (another size than annotated)")
        except InputError as error:
            bad.append(f"{name} ({error.found})")
        except Exception as error:  # Pillow raises many types
            bad.append(f"{name} ({type(error).__name__}: {error})")
    if bad:
        found = f"{len(bad)} of {len(chosen)} cannot be used, such as {bad[0]}"
        yield Finding(subject, "error", found, "replace them, or leave them out")
    else:
        yield Finding(subject, "ok", f"{len(chosen)} of {len(records)} decoded")
    if turned:
        found = f"{len(turned)} of {len(chosen)} have an EXIF orientation, such as {turned[0]}"
        advice = "it is applied: look whether the boxes fit the turned images (d2kd visualize)"
        yield Finding(f"{subject}, orientation", "warning", found, advice)
    if uniform:
        found = f"{len(uniform)} of {len(chosen)} are of nearly one colour, such as {uniform[0]}"
        yield Finding(f"{subject}, content", "warning", found, "look at them")
