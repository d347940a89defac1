"""Custom data sets in Pascal VOC's format, read by Detectron2's loader.

``ImageSets/Main/<split>.txt`` lists the images, one per line; ``Annotations/<image>.xml`` has the
boxes and ``JPEGImages/<image>.jpg`` the pixels. Detectron2's loader needs the suffix ``.jpg``: convert
other images first, or use COCO's format.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import math
import os
import shutil
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.data.datasets.pascal_voc import load_voc_instances
from detectron2.utils.file_io import PathManager

from ..utils.errors import InputError
from .catalog import check_files, expand_path, is_registered


def register_voc(name: str, root: str, split: str, classes: Sequence[str]) -> str:
    """Register a VOC-style data set and return its name, for use in a config::

        dataloader.train.dataset.names = L(register_voc)(
            name="birds_train", root="birds", split="train", classes=["robin", "wren"]
        )

    Coordinates start at 1 in the files and at 0 after loading. Boxes without area inside their
    image are dropped, with a warning. Evaluate with ``COCOEvaluator``.

    Args:
        root: the folder of Annotations, ImageSets and JPEGImages. It may start with an environment
            variable, as in ``"$BIRDS/2024"``, so that the recipe works on any machine.
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

    total = check_voc(root, split, classes)
    DatasetCatalog.register(name, partial(_load, root, split, classes))
    metadata = MetadataCatalog.get(name)
    metadata.set(
        dirname=root,
        split=split,
        evaluator_type="coco",
        thing_classes=list(classes),
        registered_as=given,
    )
    coco = convert_to_coco_dict(name)
    metadata.json_file = _write(coco, root)
    metadata.num_objects = len(coco.get("annotations", ()))
    if dropped := total - len(coco.get("annotations", ())):
        logging.getLogger(__name__).warning(
            f"{name}: {dropped} of {total} boxes left out: no area in the image"
        )
    return name


@lru_cache  # called again by the evaluator's node and the trainer; exceptions are not cached
def check_voc(root: str, split: str, classes: tuple[str, ...]) -> int:
    """Read all annotations of a split and check that its images exist, without decoding them.

    Returns:
        int: the number of boxes, those without area included.

    Raises:
        InputError: if the data set is invalid; the message names the folder, file or object.
    """
    for folder in (root, *(os.path.join(root, name) for name in ("Annotations", "JPEGImages"))):
        if not PathManager.isdir(folder):
            expected = "the folder of Annotations, ImageSets and JPEGImages"
            raise InputError(folder, "no such folder", expected if folder == root else "one")
    names, listed_by = _names(root, split), f"as listed in {_names_file(root, split)}"
    check_files((f"{name}.jpg" for name in names), os.path.join(root, "JPEGImages"), listed_by)
    annotations = os.path.join(root, "Annotations")
    check_files((f"{name}.xml" for name in names), annotations, listed_by)
    return sum(_check_xml(os.path.join(annotations, f"{name}.xml"), classes) for name in names)


def _names_file(root: str, split: str) -> str:
    return os.path.join(root, "ImageSets", "Main", f"{split}.txt")


def _names(root: str, split: str) -> list[str]:
    file = _names_file(root, split)
    if not PathManager.isfile(file):
        raise InputError(file, "no such file", "the names of the images, one a line")
    names = []
    try:
        with PathManager.open(file) as lines:
            for number, line in enumerate(lines, 1):
                words = line.partition("#")[0].split()  # np.loadtxt, used later, skips comments
                if len(words) > 1:
                    raise InputError(f"{file}: line {number}", line.strip(), "an image's name")
                names += words
    except UnicodeDecodeError as error:
        raise InputError(file, f"unreadable: {error}", "text") from error
    if not names:
        raise InputError(file, "no image", "at least one")
    if twice := [name for name, after in zip(sorted(names), sorted(names)[1:]) if name == after]:
        raise InputError(file, f"{twice[0]} twice", "every image once")
    return names


def _check_xml(file: str, classes: tuple[str, ...]) -> int:
    """Check that Detectron2's loader can read a file, and return its number of objects."""
    try:
        with PathManager.open(file) as content:
            tree = ET.parse(content)
    except (ET.ParseError, ValueError, LookupError, OSError) as error:
        raise InputError(file, f"broken XML: {error}", "an annotation in VOC's format") from error
    for key in ("size/width", "size/height"):
        if _check_number(tree.findtext(key), int, file, key) < 1:
            raise InputError(file, f"{key} {tree.findtext(key)}", "at least 1 pixel")
    objects = tree.findall("object")
    for position, one in enumerate(objects, 1):
        culprit = f"{file}: object {position}"
        if one.findtext("name") not in classes:
            found = f"class {one.findtext('name')!r}"
            raise InputError(culprit, found, f"one of {', '.join(classes)}")
        for corner in ("xmin", "ymin", "xmax", "ymax"):
            _check_number(one.findtext(f"bndbox/{corner}"), float, culprit, f"bndbox/{corner}")
    return len(objects)


def _check_number(text: str | None, kind: Callable, culprit: str, key: str) -> float:
    with contextlib.suppress(ValueError):
        if text is not None and math.isfinite(kind(text)):
            return kind(text)
    found = f"no {key}" if text is None else f"{key} {text!r}"
    raise InputError(culprit, found, f"a {'whole ' if kind is int else ''}number of pixels")


def _load(root: str, split: str, classes: tuple[str, ...]) -> list[dict]:
    """Return Detectron2's dataset dicts, without boxes that have no area inside their image."""
    names = _names(root, split)
    if len(names) > 1:
        records = load_voc_instances(root, split, classes)
    else:
        # The loader fails for a list of one name, but accepts a list in another folder.
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "twice.txt").write_text(f"{names[0]}\n" * 2)
            records = load_voc_instances(root, os.path.join(folder, "twice"), classes)[:1]
    for record in records:
        size = record["width"], record["height"]
        record["annotations"] = [a for a in record["annotations"] if _has_area(*a["bbox"], *size)]
    return records


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
    coco.setdefault("annotations", [])
    for image in coco["images"]:
        image["file_name"] = os.path.relpath(image["file_name"], root)
    folder = tempfile.mkdtemp(prefix="d2kd_voc_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    file = Path(folder, "annotations.json")
    file.write_text(json.dumps(coco))
    return str(file)
