"""Register COCO-style data sets from a config, and check data sets before training.

Errors that would otherwise appear in a worker or at the first evaluation are reported in one line
at the start.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig, OmegaConf

from ..structures.class_map import class_names
from ..utils.errors import InputError
from .catalog import INCREMENT_KEY, check_files, expand_path, is_registered
from .voc import check_voc

# The keys needed for loading, and for COCO's evaluation (`area` and `iscrowd`).
_KEYS = {
    "categories": {"id", "name"},
    "images": {"id", "file_name", "width", "height"},
    "annotations": {"id", "image_id", "category_id", "bbox", "area", "iscrowd"},
}


def coco_dataset(
    name: str, json_file: str, image_root: str, classes: Sequence[str] | None = None
) -> str:
    """Register a COCO-style data set and return its name, for use in a config::

        dataloader.train.dataset.names = L(coco_dataset)(
            name="birds_train", json_file="birds/train.json", image_root="birds/images"
        )

    Args:
        json_file, image_root: the annotations and the folder of the images. Each may start with an environment
            variable, as in ``"$BIRDS/train.json"``, so that the recipe works on any machine.
        classes: if given, the file must have exactly these classes, in the order of their category
            ids. Pass the same list for training and validation to guarantee that their class
            indices agree.

    Raises:
        InputError: if the files are invalid (see :func:`check_dataset`), a variable is not set, or
            ``name`` is already registered for other data.
    """
    classes = None if classes is None else tuple(classes)
    paths = [
        expand_path(str(path), f"the folder of {name}, to find {path}")
        for path in (json_file, image_root)
    ]
    given = (*paths, classes)
    if is_registered(name, given):
        return name

    names = _check_coco(*given)
    DatasetCatalog.register(name, lambda: load_coco_json(given[0], given[1], name))
    MetadataCatalog.get(name).set(
        json_file=given[0],
        image_root=given[1],
        evaluator_type="coco",
        thing_classes=list(names),
        registered_as=given,
    )
    return name


def dataset_names(recipe: DictConfig, part: str) -> list[str]:
    """Return the names of a recipe's data sets, and register those that the recipe registers.

    Args:
        recipe: a recipe, possibly without data.
        part: "train" or "test".

    Returns:
        list[str]: names in ``dataloader.<part>.dataset.names``; empty if the recipe has none.
    """
    names = OmegaConf.select(recipe, f"dataloader.{part}.dataset.names", default=None)
    return [] if names is None else _as_list(names)


def training_classes(recipe: DictConfig) -> tuple[str, ...] | None:
    """Return the class names of a recipe's training data; None if they have none, or are not there."""
    with contextlib.suppress(InputError, OSError):
        names = dataset_names(recipe, "train")
        return class_names(names[0]) if names else None  # a name alone is never a class
    return None


def _as_list(names) -> list[str]:
    """Build config nodes among names, and return the names as a list."""
    names = instantiate(names)
    return [names] if isinstance(names, str) else list(names)


def check_dataset(names) -> list[str]:
    """Check data sets before they are used.

    Generated sets are drawn now. For COCO-style and VOC-style sets, whether d2kd or Detectron2
    registered them, all annotations are read and all image files must exist; images are not decoded.

    Args:
        names: a name, a list of names, or config nodes that build names
            (``cfg.dataloader.train.dataset.names``).

    Returns:
        list[str]: the names.

    Raises:
        InputError: if a data set is invalid; the message names the folder, file, image or annotation.
    """
    names = _as_list(names)
    for name in names:
        if name not in DatasetCatalog.list():
            near = difflib.get_close_matches(name, DatasetCatalog.list())
            expected = " or ".join(near) or (
                "a name registered with Detectron2, coco_dataset(…) or register_voc(…)"
            )
            raise InputError(f"data set {name!r}", "not registered", expected)
        metadata = MetadataCatalog.get(name)
        if metadata.get("prepare"):
            metadata.prepare()
        if metadata.get("evaluator_type") == "coco" and metadata.get("image_root") is not None:
            _check_coco(
                metadata.json_file,
                metadata.image_root,
                (metadata.get("registered_as") or [None])[-1],
            )
        if metadata.get("dirname") is not None and metadata.get("split") is not None:
            check_voc(metadata.dirname, metadata.split, tuple(metadata.thing_classes))
    return names


@lru_cache  # called again by the evaluator's node and the trainer; exceptions are not cached
def _check_coco(
    json_file: str, image_root: str, classes: tuple[str, ...] | None
) -> tuple[str, ...]:
    """Check the files and return the class names in the order of their category ids."""
    if not PathManager.isdir(image_root):
        raise InputError(image_root, "no such folder", f"the folder with the images of {json_file}")
    content = _read(json_file)
    categories = {one["id"]: one["name"] for one in content["categories"]}
    images = {one["id"] for one in content["images"]}
    if not images or not categories:
        raise InputError(json_file, "no images or no categories", "at least one of each")

    names = tuple(categories[key] for key in sorted(categories))
    if classes is not None and set(classes) != set(names):
        lacks, adds = sorted(set(classes) - set(names)), sorted(set(names) - set(classes))
        difference = [f"no class {', '.join(lacks)}"] * bool(lacks)
        difference += [f"classes not in the list: {', '.join(adds)}"] * bool(adds)
        raise InputError(json_file, "; ".join(difference), f"the classes {', '.join(classes)}")
    if classes is not None and classes != names:
        raise InputError(
            f"classes of {json_file}",
            ", ".join(classes),
            f"the order of the category ids: {', '.join(names)}",
        )

    annotated = content.get(INCREMENT_KEY, names)  # of an incremental set, the annotated classes
    for one in content["annotations"]:
        culprit = f"{json_file}: annotation {one['id']}"
        # COCOeval stores the id of the matched object for each detection, where 0 means no match.
        if one["id"] < 1:
            raise InputError(culprit, f"id {one['id']}", "ids from 1, as COCOeval counts them")
        if one["category_id"] not in categories:
            listed = ", ".join(map(str, sorted(categories)))
            raise InputError(culprit, f"category {one['category_id']!r}", f"one of {listed}")
        if categories[one["category_id"]] not in annotated:
            found = f"class {categories[one['category_id']]!r}, outside the increment"
            raise InputError(culprit, found, f"one of {', '.join(annotated)}")
        if one["image_id"] not in images:
            raise InputError(culprit, f"image {one['image_id']!r}", "an image id of the file")
        if not _is_box(one["bbox"]):
            raise InputError(culprit, f"bbox {one['bbox']!r}", "[x, y, width, height] in pixels")

    files = (one["file_name"] for one in content["images"])
    check_files(files, image_root, f"every image that {json_file} names")
    return names


def _read(json_file: str) -> dict[str, list[dict]]:
    if not PathManager.isfile(json_file):
        raise InputError(json_file, "no such file", "annotations in COCO's format")
    try:
        with PathManager.open(json_file, "r", encoding="utf-8") as file:
            content = json.load(file)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InputError(json_file, f"broken JSON at {where}: {error.msg}", "valid JSON") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(json_file, f"unreadable: {error}", "a JSON file in UTF-8") from error

    if not isinstance(content, dict):
        raise InputError(
            json_file, f"a {type(content).__name__}", f"an object of {', '.join(_KEYS)}"
        )
    for section, keys in _KEYS.items():
        records = content.get(section)
        if not isinstance(records, list):
            raise InputError(json_file, f"no list {section!r}", f"the lists {', '.join(_KEYS)}")
        seen = set()
        for position, record in enumerate(records):
            culprit = f"{json_file}: {section}[{position}]"
            if not isinstance(record, dict):
                raise InputError(culprit, repr(record), f"an object with {', '.join(sorted(keys))}")
            if missing := keys - record.keys():
                raise InputError(
                    culprit, f"no {', '.join(sorted(missing))}", "COCO's keys for detection"
                )
            if not isinstance(record["id"], int) or record["id"] in seen:
                raise InputError(culprit, f"id {record['id']!r}", "a whole number no other has")
            seen.add(record["id"])
    return content


def _is_box(box) -> bool:
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(v, int | float) and math.isfinite(v) for v in box)
        and min(box[2:]) >= 0
    )


def sample_evenly(records: Sequence[dict], number: int) -> list[dict]:
    """Return ``number`` evenly spaced records in their order, or all if there are fewer."""
    if number >= len(records):
        return list(records)
    indices = np.unique(np.linspace(0, len(records) - 1, number).round().astype(int))
    return [records[i] for i in indices]
