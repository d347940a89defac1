"""The user's own data in Pascal VOC's format, read by Detectron2's own loader.

``ImageSets/Main/<split>.txt`` names the images, one a line; ``Annotations/<image>.xml`` has the boxes
and ``JPEGImages/<image>.jpg`` the pixels. That ending is Detectron2's: VOC-style data with other
images is converted first, or given as COCO-style data.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import math
import os
import re
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

from d2kd.data.catalog import check_files, is_registered
from d2kd.utils.errors import InputError


def register_voc(name: str, root: str, split: str, classes: Sequence[str]) -> str:
    """Register VOC-style data and return its name: a config says it where a name is expected::

        dataloader.train.dataset.names = L(register_voc)(
            name="birds_train", root="birds", split="train", classes=["robin", "wren"]
        )

    Coordinates count from 1 in the files and from 0 after loading. Boxes without area in their
    image are left out, and one warning says how many. Evaluate with ``COCOEvaluator``.

    Args:
        root: the folder of Annotations, ImageSets and JPEGImages. It may begin with an environment
            variable, as in ``"$BIRDS/2024"``: the recipe then says nothing about this machine.
        classes: row k of a classifier is class k.

    Raises:
        InputError: the files cannot be used (see :func:`check_voc`), the variable is not set, or
            `name` means other data already.
    """
    root, classes = _expanded(str(root), name), tuple(classes)
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
    if dropped := total - len(coco.get("annotations", ())):
        logging.getLogger(__name__).warning(
            f"{name}: {dropped} of {total} boxes left out: no area in the image"
        )
    return name


@lru_cache  # asked again by the evaluator's node and the trainer; an error is never remembered
def check_voc(root: str, split: str, classes: tuple[str, ...]) -> int:
    """Read every annotation of a split and look for its images, which are not decoded.

    Returns:
        The number of boxes, those without area included.

    Raises:
        InputError: naming the folder, file or object at fault.
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


def _expanded(root: str, name: str) -> str:
    variable = re.match(r"\$(\w+)", root)
    if variable and not os.environ.get(variable[1]):
        expected = f"the folder of {name}: Annotations, ImageSets and JPEGImages"
        raise InputError(variable[1], "not set", expected)
    return os.path.expandvars(root)


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
                words = line.partition("#")[0].split()  # a comment for NumPy, which reads it again
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
    """The number of objects, all of which Detectron2's loader can read; or an InputError."""
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
    """Detectron2's dataset dicts, without the boxes that have no area in their image."""
    names = _names(root, split)
    if len(names) > 1:
        records = load_voc_instances(root, split, classes)
    else:
        # The loader cannot read a list of one name. It does take a list that lies elsewhere.
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "twice.txt").write_text(f"{names[0]}\n" * 2)
            records = load_voc_instances(root, os.path.join(folder, "twice"), classes)[:1]
    for record in records:
        size = record["width"], record["height"]
        record["annotations"] = [a for a in record["annotations"] if _has_area(*a["bbox"], *size)]
    return records


def _has_area(x0: float, y0: float, x1: float, y1: float, width: float, height: float) -> bool:
    """In the file's coordinates, and in the image: the loader has taken 1 from xmin and ymin, and so given a line width."""
    meets = x0 < width and y0 < height and x1 > 0 and y1 > 0
    return meets and x0 < x1 - 1 and y0 < y1 - 1


def _write(coco: dict, root: str) -> str:
    """The set in COCO's format for COCOEvaluator, in a file that lives as long as this process.

    Left to itself the evaluator keeps such a file in its output folder and trusts it ever after,
    also when the annotations have changed. Here equal annotations give equal bytes, wherever the
    data lies and whenever: a teacher's AP is remembered by their hash.
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
