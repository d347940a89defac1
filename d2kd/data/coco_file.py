"""Annotation files in COCO's format: one schema, one reading, for training, evaluation and every check.

Files come from many tools. What they leave out, or write in another way, is understood the same way everywhere:

=================  ====================================================================================================
``iscrowd``        0 or 1; false, true, null and absent count as 0, 1, 0 and 0
``area``           a number of at least 0; null and absent: width times height of the box
annotation ``id``  may be absent; if one is absent, or no whole number from 1, all are numbered anew for the evaluation
``segmentation``   polygons or RLE; null, absent and empty: the object has no mask. Polygons of fewer than three points are
                   left out, but not their object
image ``id``       whole numbers, or texts
``bbox``           ``[x, y, width, height]`` in pixels; an object without width or height in its image is left out, in
                   training and in evaluation
the whole file     UTF-8, UTF-16 or UTF-32
=================  ====================================================================================================

All else that cannot be meant is refused in one line, which names the first record and counts the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np
import pycocotools.mask as mask_util
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..utils.errors import InputError, quoted
from .catalog import INCREMENT_KEY, LONGEST_SIDE, file_digest

logger = logging.getLogger(__name__)

_Pixels = Annotated[int, msgspec.Meta(ge=1, le=LONGEST_SIDE)]
_Length = Annotated[float, msgspec.Meta(ge=0, le=LONGEST_SIDE)]
_Area = Annotated[float, msgspec.Meta(ge=0, le=LONGEST_SIDE**2)]
_Name = Annotated[str, msgspec.Meta(min_length=1)]
SHORTEST_SIDE = 0.01
"""Pixels of a box's side in the image, below which it has none: single precision does not keep the shape of such boxes."""


class Category(msgspec.Struct):
    id: int
    name: _Name


class Image(msgspec.Struct):
    id: int | str
    file_name: _Name
    width: _Pixels
    height: _Pixels


class Annotation(msgspec.Struct, gc=False):  # nothing in it can refer to it
    image_id: int | str
    category_id: int
    bbox: tuple[float, float, _Length, _Length]
    id: int | str | None = None
    iscrowd: bool | Annotated[int, msgspec.Meta(ge=0, le=1)] | None = None
    area: _Area | None = None
    ignore: bool | Annotated[int, msgspec.Meta(ge=0, le=0)] | None = None
    # Not decoded: most readers need no masks, which are most of a file.
    segmentation: msgspec.Raw = msgspec.Raw()
    keypoints: list[float] | None = None


class _Images(msgspec.Struct):
    images: list[Image]


class _Content(_Images):
    categories: list[Category]
    annotations: list[Annotation]
    increment: list[str] | None = msgspec.field(default=None, name=INCREMENT_KEY)


_RECORDS = {"categories": Category, "images": Image, "annotations": Annotation}

_EXPECTED = {
    "iscrowd": "0 or 1",
    "ignore": "0: mark objects to leave out by iscrowd 1",
    "area": "a number of pixels, or none",
    "bbox": "[x, y, width, height] in pixels",
    "id": "a whole number",
    "name": "a text",
    "file_name": "a text",
    "width": "a whole number of pixels",
    "height": "a whole number of pixels",
    "image_id": "the id of an image",
    "category_id": "the id of a category",
    "segmentation": "polygons [[x, y, …], …] of finite numbers, or RLE",
    "keypoints": "x, y and visibility of each",
}


@dataclass(frozen=True)
class CocoFile:
    """The checked content of a file.

    Attributes:
        json_file: its path.
        classes: class names in the order of the class indices: that of the category ids, or see :meth:`with_classes`.
        category_ids: id of each class in :meth:`standard_content`.
        index_of: category id in the file -> class index.
        increment: annotated classes, if the file is an increment, see :mod:`d2kd.data.incremental`.
        file_names: of all images.
        num_objects: number of objects to learn from: not crowds, with an area.
        num_left_out: number of boxes without area in their image.
        oddities: what is accepted but unusual, a line each.
        is_standard: whether COCO's evaluation can read the file as it is.
        images: in the order of their ids; empty in a summary.
        annotations: in the order of the file, without those whose box has no area in the image; empty in a summary.
    """

    json_file: str
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    index_of: dict[int, int]
    increment: list[str] | None
    file_names: tuple[str, ...]
    num_objects: int
    num_left_out: int
    oddities: tuple[str, ...]
    is_standard: bool
    images: Sequence[Image] = ()
    annotations: Sequence[Annotation] = ()

    def with_classes(self, classes: tuple[str, ...] | None) -> CocoFile:
        """Return the file with classes in another order, and with further ones of which it has no category.

        Raises:
            InputError: the file has a class that is not among them.
        """
        if classes is None or classes == self.classes:
            return self
        if adds := sorted(set(self.classes) - set(classes)):
            lacks = sorted(set(classes) - set(self.classes))
            found = f"no class {quoted(lacks)}; " * bool(lacks)
            found += f"classes not in the list: {quoted(adds)}"
            raise InputError(self.json_file, found, f"the classes {quoted(classes)}")
        lacking = [name for name in classes if name not in self.classes]
        oddity = f"no category of {', '.join(lacking)}"
        return dataclasses.replace(
            self,
            classes=classes,
            category_ids=tuple(range(1, len(classes) + 1)),
            index_of={id: classes.index(self.classes[k]) for id, k in self.index_of.items()},
            oddities=(*self.oddities, *([oddity] if lacking else [])),
            is_standard=False,
        )

    def records(self, image_root: str) -> list[dict]:
        """Return Detectron2's dataset dicts, those of ``load_coco_json`` where the file is standard."""
        with _without_garbage_collection():
            return self._records(image_root)

    def _records(self, image_root: str) -> list[dict]:
        objects: dict[int | str, list[dict]] = {image.id: [] for image in self.images}
        for one in self.annotations:
            record = {
                "iscrowd": int(one.iscrowd or 0),
                "bbox": list(one.bbox),
                "category_id": self.index_of[one.category_id],
                "bbox_mode": BoxMode.XYWH_ABS,
            }
            if mask := _mask(one.segmentation):
                record["segmentation"] = mask
            if one.keypoints:
                # Coordinates are indices of pixels, whose centres are 0.5 further; visibility stays as it is.
                record["keypoints"] = [
                    value if i % 3 == 2 else value + 0.5 for i, value in enumerate(one.keypoints)
                ]
            objects[one.image_id].append(record)
        return [
            {
                "file_name": os.path.join(image_root, image.file_name),
                "height": image.height,
                "width": image.width,
                "image_id": image.id,
                "annotations": objects[image.id],
            }
            for image in self.images
        ]

    def standard_content(self) -> dict:
        """Return the content in the form that COCO's evaluation reads, with annotation ids from 1."""
        content = {
            "info": {},
            "categories": [
                {"id": id, "name": name} for id, name in zip(self.category_ids, self.classes)
            ],
            "images": [msgspec.structs.asdict(one) for one in self.images],
            "annotations": [
                {
                    "id": number,
                    "image_id": one.image_id,
                    "category_id": self.category_ids[self.index_of[one.category_id]],
                    "bbox": list(one.bbox),
                    "iscrowd": int(one.iscrowd or 0),
                    "area": one.bbox[2] * one.bbox[3] if one.area is None else one.area,
                }
                | ({"segmentation": mask} if (mask := _mask(one.segmentation)) else {})
                | ({"keypoints": one.keypoints} if one.keypoints else {})
                for number, one in enumerate(self.annotations, 1)
            ],
        }
        return content | ({INCREMENT_KEY: self.increment} if self.increment is not None else {})


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Millions of objects are made and kept; to look for garbage among them again and again takes twice as long."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _RLE(msgspec.Struct):
    size: tuple[_Pixels, _Pixels]
    counts: str | list[Annotated[int, msgspec.Meta(ge=0)]]

    def pixels(self) -> int | None:
        """Return how many pixels the counts are of, inside and outside of the object; None if they are damaged."""
        if isinstance(self.counts, list):
            return sum(self.counts)
        # Groups of characters of five bits each, the lowest first; the sixth is set in all but the last of a group. From
        # the third number on, each is the difference from the last but one.
        code = np.frombuffer(self.counts.encode(), np.uint8).astype(np.int64) - 48
        if (code < 0).any() or (code > 63).any() or code[-1] & 32:
            return None
        first = np.flatnonzero(np.concatenate([[True], code[:-1] & 32 == 0]))
        length = np.diff(first, append=len(code))
        if length.max() > 12:
            return None
        place = np.arange(len(code)) - np.repeat(first, length)
        value = np.add.reduceat((code & 31) << 5 * place, first)
        value -= (code[first + length - 1] & 16 != 0).astype(np.int64) << 5 * length
        for k in (1, 2):
            value[k::2] = value[k::2].cumsum()
        return int(value.sum()) if (value >= 0).all() else None


_MASK = msgspec.json.Decoder(list[list[float]] | _RLE | None)


def _mask(raw: msgspec.Raw) -> list[list[float]] | dict | None:
    """Return polygons of at least three points, or a compressed RLE; None if there is no mask.

    Raises:
        msgspec.ValidationError: it is something else.
    """
    mask = _MASK.decode(raw) if len(raw) else None
    if isinstance(mask, list):
        return [polygon for polygon in mask if len(polygon) >= 6 and len(polygon) % 2 == 0] or None
    if mask is None or not mask.counts:
        return None
    rle = msgspec.structs.asdict(mask) | {"size": list(mask.size)}
    return mask_util.frPyObjects(rle, *mask.size) if isinstance(mask.counts, list) else rle


def summarize_coco_file(json_file: str) -> CocoFile:
    """Read and check a file, and return all but its images and annotations.

    Raises:
        InputError: the file cannot be read, or its content cannot be meant, see the table of this module.
    """
    content = _read(json_file)
    digest = file_digest(content)
    if digest not in _summaries:
        file = _check(json_file, *_decode(json_file, content))
        for oddity in file.oddities:
            logger.warning("%s: %s", json_file, oddity)
        _summaries[digest] = dataclasses.replace(file, images=(), annotations=())
        _decoded[digest] = file
        if len(_decoded) > _MOST_DECODED:
            del _decoded[next(iter(_decoded))]
    return dataclasses.replace(_summaries[digest], json_file=json_file)


def read_coco_file(json_file: str) -> CocoFile:
    """Read and check a file as :func:`summarize_coco_file` does, and return all of it.

    A file that was summarized before is not decoded once more for the first who needs all of it.
    """
    content = _read(json_file)
    digest = file_digest(content)
    file = _decoded.pop(digest, None) or _check(json_file, *_decode(json_file, content))
    return dataclasses.replace(file, json_file=json_file)


def read_coco_images(json_file: str) -> list[Image]:
    """Read and check the images of a file. It need not have annotations or categories, and they are not read.

    Raises:
        InputError: the file cannot be read, or has no images, or invalid ones.
    """
    content, _ = _decode(json_file, _read(json_file), _Images)
    if not content.images:
        raise InputError(json_file, "no images", "at least one")
    _refuse_repeated(json_file, "images", content.images, "id", "file_name")
    return content.images


# By the hash of the content, because files are corrected and read again under the same name.
_summaries: dict[str, CocoFile] = {}
_decoded: dict[str, CocoFile] = {}
_MOST_DECODED = 2  # a training and a test set


def _read(json_file: str) -> bytes:
    if not PathManager.isfile(json_file):
        raise InputError(json_file, "no such file", "annotations in COCO's format")
    try:
        with PathManager.open(json_file, "rb") as file:
            return file.read()
    except OSError as error:
        raise InputError(json_file, f"unreadable: {error}", "a JSON file") from error


def _decode(
    json_file: str, content: bytes, kind: type[_Images] = _Content
) -> tuple[_Content | _Images, bool]:
    """Return the content, and whether it is in UTF-8 with all of the schema's types."""
    try:
        return msgspec.json.decode(content, type=kind), True
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _decode_leniently(json_file, content, kind), False


def _decode_leniently(json_file: str, content: bytes, kind: type[_Images]) -> _Content | _Images:
    """Decode a file in another Unicode encoding or with whole numbers as 1.0, or raise InputError for its first fault. Slow."""
    try:
        whole = json.loads(content)  # which recognises UTF-8, UTF-16 and UTF-32
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InputError(json_file, f"broken JSON at {where}: {error.msg}", "valid JSON") from error
    except (ValueError, RecursionError) as error:  # bytes, a number of 5000 digits, lists in lists
        raise InputError(json_file, f"unreadable: {error}", "a JSON file in UTF-8") from error
    records = {key: one for key, one in _RECORDS.items() if key in kind.__struct_fields__}
    sections = ", ".join(records)
    if not isinstance(whole, dict):
        raise InputError(json_file, f"a {type(whole).__name__}", f"an object of {sections}")
    decoded = {}
    for section, record_kind in records.items():
        if not isinstance(whole.get(section), list):
            found = f"no list {section!r}; its keys are {quoted([*whole])}"
            if section in whole:
                found = f"{section!r} is a {type(whole[section]).__name__}"
            raise InputError(json_file, found, f"the lists {sections}")
        faults, decoded[section] = _Faults(json_file, section), []
        for position, record in enumerate(whole[section]):
            try:
                decoded[section].append(_convert(record, record_kind))
            except msgspec.ValidationError as error:
                id = record.get("id") if isinstance(record, dict) else None
                faults.add(position, id, *_describe(record_kind, record, error))
        faults.refuse()
    if kind is _Images:
        return _Images(**decoded)
    try:
        increment = msgspec.convert(whole.get(INCREMENT_KEY), list[str] | None)
    except msgspec.ValidationError as error:
        raise InputError(json_file, f"{INCREMENT_KEY}: {error}", "class names") from error
    return _Content(**decoded, increment=increment)


def _convert(record, kind: type) -> Category | Image | Annotation:
    """Convert a record to its struct.

    Raises:
        msgspec.ValidationError: it has another type; or what Python's reader takes, NaN, Infinity or half a character.
    """
    if isinstance(record, dict):
        record = {key: _as_whole(value) for key, value in record.items()}
        for key, value in record.items():
            if key in kind.__struct_fields__ and not _is_json(value):
                raise msgspec.ValidationError(f"no JSON - at `$.{key}`")
        if "segmentation" in record:
            record["segmentation"] = msgspec.Raw(msgspec.json.encode(record["segmentation"]))
    return msgspec.convert(record, kind)


def _as_whole(value):
    """Return 1 for 1.0, as tables write whole numbers of a column in which others are missing."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_json(value) -> bool:
    """Return whether a value is JSON's: Python also reads NaN, Infinity and halves of characters."""
    if isinstance(value, list):
        return all(map(_is_json, value))
    if isinstance(value, str):
        return not any("\ud800" <= c <= "\udfff" for c in value)
    return not isinstance(value, float) or math.isfinite(value)


class _Faults:
    """Faults of records in a section of a file. The first is refused, with the number of its kind."""

    def __init__(self, json_file: str, section: str):
        self._where = f"{json_file}: {section}"
        self._first: tuple[str, str, str] | None = None
        self._kinds: Counter[str] = Counter()

    def add(self, position: int, id, found: str, expected: str) -> None:
        """Add a fault of the record at a position; faults whose ``found`` begins with the same word are of one kind."""
        self._kinds[found.split()[0]] += 1
        if self._first is None:
            named = "" if id is None else f" (id {id})"
            self._first = f"{self._where}[{position}]{named}", found, expected

    def refuse(self) -> None:
        """Raise InputError if there are faults."""
        if self._first is not None:
            culprit, found, expected = self._first
            others = self._kinds[found.split()[0]] - 1
            raise InputError(culprit, found + (f", and {others} more" if others else ""), expected)


def _describe(kind: type, record, error: msgspec.ValidationError) -> tuple[str, str]:
    """Return what is found instead of a record of this kind, and what is expected."""
    required = [one.name for one in msgspec.structs.fields(kind) if one.required]
    if not isinstance(record, dict):
        return _short(record), f"an object with {', '.join(required)}"
    for key in required:
        if key not in record:
            return f"no {key}", "COCO's keys for detection"
    key = str(error).partition("$.")[2].rstrip("`").partition("[")[0]
    return f"{key} {_short(record.get(key))}", _EXPECTED.get(key, str(error))


def _short(value, longest: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _check(json_file: str, content: _Content, plain: bool) -> CocoFile:
    """Check what a schema cannot say, and leave out boxes without area."""
    categories, images, annotations = content.categories, content.images, content.annotations
    if not images or not categories:
        raise InputError(json_file, "no images or no categories", "at least one of each")
    _refuse_repeated(json_file, "categories", categories, "id", "name")
    _refuse_repeated(json_file, "images", images, "id", "file_name")
    texts = sum(isinstance(one.id, str) for one in images)
    if 0 < texts < len(images):
        raise InputError(json_file, f"{texts} of {len(images)} image ids are texts", "all or none")
    _check_annotations(json_file, content)

    sizes = {one.id: (one.width, one.height) for one in images}
    kept = [one for one in annotations if _has_area(*one.bbox, *sizes[one.image_id])]
    oddities = []
    if flat := len(annotations) - len(kept):
        found = f"{flat} of {len(annotations)} boxes left out: no width or no height in the image"
        oddities.append(found)
    if twice := len(kept) - len({(one.image_id, one.category_id, one.bbox) for one in kept}):
        oddities.append(f"{twice} objects are there twice: same image, class and box")
    standard = (
        plain
        and not flat
        and all(
            # COCOeval stores the id of the matched object for each detection, where 0 means no match.
            type(one.id) is int
            and one.id >= 1
            and one.area is not None
            and type(one.iscrowd) is int
            for one in kept
        )
    )
    categories = sorted(categories, key=lambda one: one.id)
    return CocoFile(
        json_file=json_file,
        classes=tuple(one.name for one in categories),
        category_ids=tuple(one.id for one in categories),
        index_of={one.id: k for k, one in enumerate(categories)},
        increment=content.increment,
        file_names=tuple(one.file_name for one in images),
        num_objects=sum(not one.iscrowd for one in kept),
        num_left_out=flat,
        oddities=tuple(oddities),
        is_standard=standard,
        images=sorted(images, key=lambda one: one.id),
        annotations=kept,
    )


def _has_area(x: float, y: float, w: float, h: float, width: int, height: int) -> bool:
    inside = min(x + w, width) - max(x, 0), min(y + h, height) - max(y, 0)
    return min(inside) >= SHORTEST_SIDE


def _check_annotations(json_file: str, content: _Content) -> None:
    names = {one.id: one.name for one in content.categories}
    images = {one.id: one for one in content.images}
    annotated = set(names.values() if content.increment is None else content.increment)
    faults = _Faults(json_file, "annotations")
    for position, one in enumerate(content.annotations):
        if one.category_id not in names:
            listed = ", ".join(map(str, sorted(names)))
            faults.add(position, one.id, f"category {one.category_id!r}", f"one of {listed}")
        elif names[one.category_id] not in annotated:
            found = f"class {names[one.category_id]!r}, outside the increment"
            faults.add(position, one.id, found, f"one of {', '.join(sorted(annotated))}")
        if (image := images.get(one.image_id)) is None:
            faults.add(position, one.id, f"image {one.image_id!r}", "an image id of the file")
        if one.ignore:
            faults.add(position, one.id, "ignore True", _EXPECTED["ignore"])
        if one.keypoints and len(one.keypoints) % 3:
            found = f"keypoints of {len(one.keypoints)} numbers"
            faults.add(position, one.id, found, _EXPECTED["keypoints"])
        try:
            mask = _MASK.decode(one.segmentation or b"null")
        except msgspec.ValidationError as error:
            faults.add(position, one.id, f"segmentation: {error}", _EXPECTED["segmentation"])
            continue
        if isinstance(mask, _RLE) and mask.counts and image is not None:
            size = image.height, image.width
            pixels = mask.pixels()
            if mask.size != size or pixels != image.height * image.width:
                many = "damaged" if pixels is None else f"of {pixels} pixels"
                found = f"segmentation: RLE {many}, size {[*mask.size]}"
                faults.add(position, one.id, found, f"RLE of the image's size {[*size]}")
    faults.refuse()
    if all(one.id is not None for one in content.annotations):
        _refuse_repeated(json_file, "annotations", content.annotations, "id")


def _refuse_repeated(json_file: str, section: str, records: Sequence, *keys: str) -> None:
    for key in keys:
        values = [getattr(one, key) for one in records]
        if key == "file_name":
            values = [os.path.normpath(value) for value in values]
        if len(set(values)) == len(values):
            continue
        faults, seen = _Faults(json_file, section), set()
        for position, value in enumerate(values):
            if value in seen:
                faults.add(position, None, f"{key} {value!r} once more", "one that no other has")
            seen.add(value)
        faults.refuse()
