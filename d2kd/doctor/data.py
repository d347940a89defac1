"""Images that cannot be read, images without objects, boxes that lie outside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog, detection_utils
from detectron2.structures import BoxMode
from omegaconf import DictConfig

from ..data import check_dataset
from ..data.datasets import dataset_names, spread
from ..utils.errors import InputError
from .findings import Finding

SLACK = 1.0  # pixels that a box may lie outside the image: annotators round
MANY = 0.01  # the share of bad boxes from which they are no slips
MOSTLY = 0.5  # the share of images without objects from which they are worth a word


def look_at_data(config: DictConfig, images: int) -> Iterator[Finding]:
    """Look at training and test data.

    Args:
        config: a complete recipe.
        images: how many of each to decode, spread over the set; 0: all.
    """
    for part in ("train", "test"):
        try:
            names = check_dataset(dataset_names(config, part))
        except InputError as error:
            advice = f"{error.expected}"
            yield Finding(f"{part} data", "error", f"{error.culprit}: {error.found}", advice)
            continue
        if not names:
            yield Finding(f"{part} data", "ok", "no names of data sets: not looked at")
            continue
        records = [record for name in names for record in DatasetCatalog.get(name)]
        classes = _wanted(MetadataCatalog.get(names[0]))
        yield from _annotations(f"{part} data", records, classes)
        yield _files(f"{part} images", records, images)


def _wanted(metadata: Metadata) -> dict[int, str]:
    """The classes a data set is about: of a class step its own, by the numbers that all steps have."""
    part, names = metadata.get("class_step"), metadata.get("thing_classes") or []
    if part is None:
        return dict(enumerate(names))
    return {k: name for name, k in part.numbers.items()}


def _annotations(
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
    state = "warning" if empty > MOSTLY * len(records) else "ok"
    advice = "leave them out (of a dataset node: filter_empty=True), if they are not meant"
    yield Finding(subject, state, f"{found}, {empty} images without any", advice * (state != "ok"))

    values = np.asarray(rows, dtype=float)
    box, size, category = values[:, :4], values[:, 4:6], values[:, 6].astype(int)
    outside = ((box[:, :2] < -SLACK) | (box[:, 2:] > size + SLACK)).any(axis=1)
    flat = (box[:, 2:] <= box[:, :2]).any(axis=1)
    bad = int((outside | flat).sum())
    if bad:
        state = "error" if bad >= MANY * len(rows) else "warning"
        found = (
            f"{int(outside.sum())} boxes lie outside their image, {int(flat.sum())} have no area"
        )
        advice = "correct the annotations: such boxes are cut or dropped without a word"
        yield Finding(f"{subject}, boxes", state, found, advice)
    else:
        yield Finding(f"{subject}, boxes", "ok", "all inside their images")
    missing = [name for k, name in classes.items() if not (category == k).any()]
    if missing:
        found = f"no object of {', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}"
        yield Finding(f"{subject}, classes", "warning", found, "leave them out, or add examples")


def _files(subject: str, records: Sequence[dict], images: int) -> Finding:
    chosen = spread(records, images or len(records))
    bad = []
    for record in chosen:
        try:
            image = detection_utils.read_image(record["file_name"], format="BGR")
            detection_utils.check_image_size(dict(record), image)
        except detection_utils.SizeMismatchError:
            bad.append(f"{record['file_name']} (another size than annotated)")
        except Exception as error:  # PIL has many
            bad.append(f"{record['file_name']} ({type(error).__name__})")
    if bad:
        found = f"{len(bad)} of {len(chosen)} cannot be used, such as {bad[0]}"
        return Finding(subject, "error", found, "replace them, or leave them out")
    return Finding(subject, "ok", f"{len(chosen)} of {len(records)} decoded")
