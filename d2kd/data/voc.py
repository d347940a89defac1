"""Custom data sets in Pascal VOC's format.

Either as VOC's own: ``ImageSets/Main/<split>.txt`` lists the images, one per line; ``Annotations/<image>.xml`` has the
boxes and ``JPEGImages`` the pixels, both maybe in folders that the list names. Or flat, as some tools export it: the folder
``<split>`` has a file ``.xml`` beside each image. An image is found by its name, with any usual suffix; if several or none
are there, the annotation's ``<filename>`` says which.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import json
import logging
import math
import os
import re
import shutil
import tempfile
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..utils.errors import InputError
from .catalog import (
    LONGEST_SIDE,
    check_files,
    expand_path,
    file_digest,
    is_registered,
    refuse_missing,
)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def register_voc(name: str, root: str, split: str, classes: Sequence[str]) -> str:
    """Register a VOC-style data set and return its name, for use in a config::

        dataloader.train.dataset.names = L(register_voc)(
            name="birds_train", root="birds", split="train", classes=["robin", "wren"]
        )

    Coordinates start at 1 in the files and at 0 after loading. Boxes without area inside their
    image are dropped, with a warning. Evaluate with ``COCOEvaluator``.

    Args:
        root: the folder of Annotations, ImageSets and JPEGImages, or of a flat folder for each split. It may start
            with an environment variable, as in ``"$BIRDS/2024"``, so that the recipe works on any machine.
        classes: class names in the order of their class indices.

    Raises:
        InputError: if the files are invalid (see :func:`check_voc`), the variable is not set, or
            ``name`` is already registered for other data.
    """
    content = f"the folder of {name}: Annotations, ImageSets and JPEGImages"
    root, classes = expand_path(str(root), content), tuple(classes)
    if not classes or len(set(classes)) < len(classes):
        raise InputError(f"classes of {name}", ", ".join(classes) or "none", "different names")
    given = (_names_file(root, split), root, classes)
    if is_registered(name, given):
        return name

    check_voc(root, split, classes)
    DatasetCatalog.register(name, partial(_load, root, split, classes))
    MetadataCatalog.get(name).set(
        dirname=root,
        split=split,
        evaluator_type="coco",
        thing_classes=list(classes),
        registered_as=given,
    )
    refresh_voc(name)
    return name


def refresh_voc(name: str) -> None:
    """Write the annotations of a registered set for COCO's evaluation, if their files have changed."""
    metadata = MetadataCatalog.get(name)
    load = DatasetCatalog[name]
    if not (isinstance(load, partial) and load.func is _load):
        return  # registered with Detectron2, for its own evaluation
    digest = _digest(_find_layout(*load.args[:2]))
    if metadata.get("digest") == digest:
        return
    coco = convert_to_coco_dict(name)
    coco.setdefault("annotations", [])
    known = metadata.as_dict() | {"json_file": _write(coco, load.args[0]), "digest": digest}
    known["num_objects"] = kept = len(coco["annotations"])
    known["oddities"] = oddities = []
    known["num_left_out"] = dropped = check_voc(*load.args) - kept
    if dropped:
        oddities.append(f"{dropped} of {dropped + kept} boxes left out: no area in the image")
    known.pop("name")
    MetadataCatalog.remove(name)
    MetadataCatalog.get(name).set(**known)
    for oddity in oddities:
        logging.getLogger(__name__).warning("%s: %s", name, oddity)


@dataclass(frozen=True)
class _Layout:
    """Where the files of a split are.

    Attributes:
        listed_in: the file, or the folder, that lists the images.
        names: of the images, without suffix.
        annotations, images: folders.
    """

    listed_in: str
    names: tuple[str, ...]
    annotations: str
    images: str


def check_voc(root: str, split: str, classes: tuple[str, ...]) -> int:
    """Read all annotations of a split and check that its images exist, without decoding them.

    Returns:
        int: the number of boxes, those without area included.

    Raises:
        InputError: if the data set is invalid; the message names the folder, file or object.
    """
    return sum(len(record["annotations"]) for record in _read(root, split, classes))


def _load(root: str, split: str, classes: tuple[str, ...]) -> list[dict]:
    """Return dataset dicts as Detectron2's ``load_voc_instances``, without boxes that have no area in their image."""
    records = _read(root, split, classes)
    for record in records:
        size = record["width"], record["height"]
        record["annotations"] = [a for a in record["annotations"] if _has_area(*a["bbox"], *size)]
    return records


def _read(root: str, split: str, classes: tuple[str, ...]) -> list[dict]:
    layout = _find_layout(root, split)
    return copy.deepcopy(_read_layout(layout, classes, _digest(layout)))


def _digest(layout: _Layout) -> str:
    """Return a hash of names, sizes and times of the annotations, and of the images' names."""
    seen = []
    for folder in sorted({os.path.dirname(name) for name in layout.names}):
        annotations = PathManager.get_local_path(os.path.join(layout.annotations, folder))
        with contextlib.suppress(FileNotFoundError), os.scandir(annotations) as files:
            seen += sorted((f.path, f.stat().st_size, f.stat().st_mtime_ns) for f in files)
        seen += sorted(_images(os.path.join(layout.images, folder)).items())
    return file_digest(repr(seen).encode())


def _images(folder: str) -> dict[str, list[str]]:
    """Return the images in a folder, name without suffix -> file names."""
    by_stem = defaultdict(list)
    for file in sorted(PathManager.ls(folder)) if PathManager.isdir(folder) else ():
        stem, suffix = os.path.splitext(file)
        if suffix.lower() in IMAGE_SUFFIXES:
            by_stem[stem].append(file)
    return by_stem


# By the digest, because files are corrected and read again; errors are not kept.
@lru_cache(maxsize=8)
def _read_layout(layout: _Layout, classes: tuple[str, ...], digest: str) -> list[dict]:
    listed_by = f"as listed in {layout.listed_in}"
    check_files((f"{name}.xml" for name in layout.names), layout.annotations, listed_by)
    folders = {os.path.dirname(name) for name in layout.names}
    present = {folder: _images(os.path.join(layout.images, folder)) for folder in folders}
    records, missing = [], []
    for name in layout.names:
        file = os.path.join(layout.annotations, f"{name}.xml")
        tree = _parse(file)
        folder, stem = os.path.split(name)
        images = present[folder].get(stem, [])
        if len(images) != 1:
            one = (tree.findtext("filename") or "").strip()
            if one and PathManager.isfile(os.path.join(layout.images, folder, one)):
                images = [one]
        if not images:
            missing.append(f"{name}.jpg")
            continue
        if len(images) > 1:
            raise InputError(file, f"images {', '.join(images)}", "one, or its name in <filename>")
        width, height = (
            _check_number(tree.findtext(key), int, file, key)
            for key in ("size/width", "size/height")
        )
        for key, value in (("size/width", width), ("size/height", height)):
            if value < 1:
                raise InputError(file, f"{key} {value}", "at least 1 pixel")
        records.append(
            {
                "file_name": os.path.join(layout.images, folder, images[0]),
                "image_id": name,
                "height": height,
                "width": width,
                "annotations": _objects(tree, file, classes),
            }
        )
    if missing:
        expected = f"an image {listed_by}, of any suffix in {', '.join(IMAGE_SUFFIXES)}"
        refuse_missing(layout.images, missing, expected)
    return records


def voc_classes(root: str) -> list[str]:
    """Return the sorted class names in all annotations below a folder; files that cannot be read are left out."""
    found = set()
    for file in sorted(Path(root).rglob("*.xml")):
        with contextlib.suppress(InputError):  # register_voc names it, if a split lists it
            found |= {one.findtext("name", "").strip() for one in _parse(str(file)).iter("object")}
    return sorted(found - {""})


def _find_layout(root: str, split: str) -> _Layout:
    if not PathManager.isdir(root):
        expected = "the folder of Annotations, ImageSets and JPEGImages"
        raise InputError(root, "no such folder", expected)
    flat = os.path.join(root, split)
    if not PathManager.isdir(os.path.join(root, "Annotations")) and PathManager.isdir(flat):
        files = [f for f in sorted(PathManager.ls(flat)) if f.lower().endswith(".xml")]
        names = tuple(f[: -len(".xml")] for f in files if not f.startswith("."))
        if not names:
            raise InputError(flat, "no .xml file", "one beside each image")
        for name in names:
            if any("\ud800" <= c <= "\udfff" for c in name):  # as Python decodes bytes of others
                raise InputError(flat, f"the file name {name!a}", "file names in UTF-8")
        return _Layout(flat, names, flat, flat)
    for folder in ("Annotations", "JPEGImages"):
        if not PathManager.isdir(os.path.join(root, folder)):
            expected = f"one, or a folder {split} of images and .xml files"
            raise InputError(os.path.join(root, folder), "no such folder", expected)
    annotations = os.path.join(root, "Annotations")
    names = _names(root, split, set(PathManager.ls(annotations)))
    return _Layout(
        _names_file(root, split), tuple(names), annotations, os.path.join(root, "JPEGImages")
    )


def _names_file(root: str, split: str) -> str:
    return os.path.join(root, "ImageSets", "Main", f"{split}.txt")


def _names(root: str, split: str, annotations: set[str]) -> list[str]:
    """Return the names in the list of a split. They may have spaces; what follows ``#`` is a comment."""
    file = _names_file(root, split)
    if not PathManager.isfile(file):
        raise InputError(file, "no such file", "the names of the images, one a line")
    names = []
    try:
        with PathManager.open(file, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                name = line.strip()
                if f"{name}.xml" not in annotations:
                    name = line.partition("#")[0].strip()
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in IMAGE_SUFFIXES and f"{stem}.xml" in annotations:
                    name = stem
                if len(name.split()) > 1 and f"{name}.xml" not in annotations:
                    raise InputError(f"{file}: line {number}", name, "an image's name")
                names += [name] if name else []
    except UnicodeDecodeError as error:
        raise InputError(file, f"unreadable: {error}", "text in UTF-8") from error
    if not names:
        raise InputError(file, "no image", "at least one")
    if twice := [name for name, after in zip(sorted(names), sorted(names)[1:]) if name == after]:
        raise InputError(file, f"{twice[0]} twice", "every image once")
    return names


def _parse(file: str) -> ET.ElementTree:
    try:
        with PathManager.open(file, "rb") as opened:
            content = opened.read()
        declared = re.match(rb"\s*<\?xml[^>]*encoding=[\"']([\w.:-]+)[\"'][^>]*\?>", content)
        if declared:  # expat knows few encodings, Python many
            content = content[declared.end() :].decode(declared[1].decode())
        root = ET.fromstring(content)
        for one in root.iter():
            if isinstance(one.tag, str):  # VOC has no namespaces
                one.tag = one.tag.rpartition("}")[2]
        return ET.ElementTree(root)
    except (ET.ParseError, ValueError, LookupError, OSError) as error:
        expected = "an annotation in VOC's format, in UTF-8 or the encoding that it declares"
        raise InputError(file, f"broken XML: {error}", expected) from error


def _objects(tree: ET.ElementTree, file: str, classes: tuple[str, ...]) -> list[dict]:
    found = []
    for position, one in enumerate(tree.iter("object"), 1):
        culprit = f"{file}: object {position}"
        name = one.findtext("name")
        name = name if name in classes else (name or "").strip()
        if name not in classes:
            expected = f"one of {', '.join(classes)}"
            raise InputError(culprit, f"class {one.findtext('name')!r}", expected)
        x0, y0, x1, y1 = (
            float(_check_number(one.findtext(f"bndbox/{key}"), float, culprit, f"bndbox/{key}"))
            for key in ("xmin", "ymin", "xmax", "ymax")
        )
        found.append(
            {
                # VOC counts pixels from 1, and xmax and ymax are inside the box.
                "bbox": [x0 - 1, y0 - 1, x1, y1],
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": classes.index(name),
            }
        )
    return found


def _check_number(text: str | None, kind: Callable, culprit: str, key: str) -> float:
    with contextlib.suppress(ValueError, OverflowError):
        value = float(text) if text is not None else math.nan
        if abs(value) <= LONGEST_SIDE and value == kind(value):  # not if it is nan
            return kind(value)
    found = f"no {key}" if text is None else f"{key} {text!r}"
    raise InputError(culprit, found, f"a {'whole ' if kind is int else ''}number of pixels")


def _has_area(x0: float, y0: float, x1: float, y1: float, width: float, height: float) -> bool:
    """Return whether a box has area in the file's coordinates, where xmin and ymin are larger by 1, and in the image."""
    meets = x0 < width and y0 < height and x1 > 0 and y1 > 0
    return meets and x0 < x1 - 1 and y0 < y1 - 1


def _write(coco: dict, root: str) -> str:
    """Write the set in COCO's format for COCOEvaluator, to a file that this process deletes at exit.

    By default, the evaluator caches such a file in its output folder and does not notice changed
    annotations. The content depends on the annotations only, not on their location or the time,
    because a teacher's AP is cached by its hash.
    """
    coco["info"] = {}
    for image in coco["images"]:
        image["file_name"] = os.path.relpath(image["file_name"], root)
    folder = tempfile.mkdtemp(prefix="d2kd_voc_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    file = Path(folder, "annotations.json")
    file.write_text(json.dumps(coco))
    return str(file)
