"""Register COCO-style data sets from a config, and check data sets before training.

Errors that would otherwise appear in a worker or at the first evaluation are reported in one line
at the start.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from detectron2.config import instantiate
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    get_detection_dataset_dicts,
)
from detectron2.data.build import filter_images_with_only_crowd_annotations
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig, OmegaConf

from ..structures.class_map import class_names
from ..utils.errors import InputError, quoted
from .catalog import ANNOTATIONS_PREFIX, check_files, expand_path, is_registered
from .coco_file import CocoFile, read_coco_file, read_coco_images, summarize_coco_file
from .images import SUFFIXES, find_images, image_size, reading_mapper
from .voc import check_voc, refresh_voc

logger = logging.getLogger(__name__)

DATASET_NAME = "dataset_name"
"""Key of a dataset dict with the name of its data set, in training."""

UNLABELLED = "unlabelled"
"""Key, of the value True, of dataset dicts and samples of images without labels, and of the metadata of their set."""


def coco_dataset(
    name: str,
    json_file: str,
    image_root: str,
    classes: Sequence[str] | None = None,
    unlabelled: bool = False,
) -> str:
    """Register a COCO-style data set and return its name, for use in a config::

        dataloader.train.dataset.names = L(coco_dataset)(
            name="birds_train", json_file="birds/train.json", image_root="birds/images"
        )

    Args:
        json_file, image_root: the annotations and the folder of the images. Each may start with an environment
            variable, as in ``"$BIRDS/train.json"``, so that the recipe works on any machine.
        classes: class names in the order of the class indices. A file may have them in another order, and may lack
            some. Pass the same list for training and validation, so that their class indices agree. By default, the
            classes of the file in the order of their category ids.
        unlabelled: whether the images are used without labels, for distillation alone. Annotations, categories and
            ``classes`` are not used, and the file need not have them.

    Raises:
        InputError: if the files are invalid (see :mod:`d2kd.data.coco_file`), a variable is not set, or ``name`` is
            already registered for other data.
    """
    classes = None if classes is None else tuple(classes)
    paths = [
        expand_path(str(path), f"the folder of {name}, to find {path}")
        for path in (json_file, image_root)
    ]
    if unlabelled:
        load, files = (partial(function, *paths) for function in (_load_images, _image_files))
        return _register_unlabelled(name, tuple(paths), load, files)
    given = (*paths, classes)
    if not is_registered(name, given):
        file = _check_coco(*given)
        DatasetCatalog.register(name, partial(_load_coco, name, *given))
        _set_coco_metadata(name, file, image_root=given[1], registered_as=given)
    return name


def image_folder(name: str, root: str) -> str:
    """Register the images in a folder and the folders in it, without labels, and return the name, for use in a config::

        dataloader.train.dataset.names = [
            "birds_train",
            L(image_folder)(name="birds_photos", root="$BIRDS/photos"),
        ]

    Args:
        root: the folder. It may start with an environment variable. Files with another suffix than an image's are left out.

    Raises:
        InputError: if there is no such folder, it has no image, the variable is not set, or ``name`` is already registered
            for other data; while loading, if an image cannot be read.
    """
    root = expand_path(str(root), f"the folder of {name}, to find {root}")
    files = partial(_files_in, root)
    return _register_unlabelled(name, ("images", root), partial(_load_folder, root), files)


def _register_unlabelled(
    name: str,
    given: tuple[str, str],
    load: Callable[[], list[dict]],
    files: Callable[[], list[str]],
) -> str:
    """Register images without labels, see :func:`coco_dataset` and :func:`image_folder`.

    Args:
        given: kind and place of the data, by which a name that is taken is recognised.
        load: function that returns the dataset dicts.
        files: function that checks the files, and returns their names.
    """
    given = (*given, UNLABELLED)
    if not is_registered(name, given):
        more = {"image_files": files(), "registered_as": given, "prepare": files, UNLABELLED: True}
        DatasetCatalog.register(name, load)
        MetadataCatalog.get(name).set(**more)
    return name


def _load_images(json_file: str, image_root: str) -> list[dict]:
    """Return the dataset dicts of a COCO-style file without its annotations."""
    return [
        _unlabelled_record(
            os.path.join(image_root, image.file_name), image.width, image.height, image.id
        )
        for image in read_coco_images(json_file)
    ]


def _image_files(json_file: str, image_root: str) -> list[str]:
    _check_image_root(json_file, image_root)
    names = [image.file_name for image in read_coco_images(json_file)]
    check_files(names, image_root, f"every image that {json_file} names")
    return [os.path.join(image_root, name) for name in names]


def _load_folder(root: str) -> list[dict]:
    return [
        _unlabelled_record(file, *image_size(file), number)
        for number, file in enumerate(_files_in(root))
    ]


def _unlabelled_record(file: str, width: int, height: int, number: int) -> dict:
    size = {"height": height, "width": width}
    return {"file_name": file, **size, "image_id": number, UNLABELLED: True}


def _files_in(root: str) -> list[str]:
    if not Path(root).is_dir():
        raise InputError(root, "no such folder", "a folder of images")
    if not (files := find_images(Path(root))):
        raise InputError(root, "no image", f"at least one, *{', *'.join(SUFFIXES)}")
    return [str(file) for file in files]


def labelled_names(names: Sequence[str]) -> list[str]:
    """Return the registered data sets that have labels."""
    return [name for name in names if not MetadataCatalog.get(name).get(UNLABELLED)]


def check_labelled(train: Sequence[str], test: Sequence[str]) -> None:
    """Check that some training data and all test data have labels.

    Raises:
        InputError: naming the data sets that have none.
    """
    for part, names, least in (("training", train, 1), ("test", test, len(test))):
        labelled = labelled_names(names)
        if names and len(labelled) < least:
            without = ", ".join(name for name in names if name not in labelled)
            expected = "labels" if part == "test" else "a data set with labels, too"
            raise InputError(f"{part} data {without}", "unlabelled images", expected)


def _load_coco(name: str, json_file: str, image_root: str, classes: tuple[str, ...] | None):
    """Return the dataset dicts of a file as it is now."""
    file = read_coco_file(json_file).with_classes(classes)
    _set_coco_metadata(name, file)
    logger.info("%s: %d images from %s", name, len(file.images), json_file)
    return file.records(image_root)


def _set_coco_metadata(name: str, file: CocoFile, **more) -> None:
    """Set the metadata that follow from a file, and others; Detectron2 allows no second value."""
    known = MetadataCatalog.get(name).as_dict() if name in MetadataCatalog.list() else {}
    new = {
        "evaluator_type": "coco",
        "thing_classes": list(file.classes),
        "thing_dataset_id_to_contiguous_id": {id: k for k, id in enumerate(file.category_ids)},
        "num_objects": file.num_objects,
        "num_left_out": file.num_left_out,
        "oddities": file.oddities,
    }
    if root := more.get("image_root", known.get("image_root")):
        new["image_files"] = [os.path.join(root, name) for name in file.file_names]
    new["json_file"] = file.json_file if file.is_standard else f"{ANNOTATIONS_PREFIX}{name}"
    new["derived"] = None if file.is_standard else StandardForm(file.json_file, file.classes)
    if any(known.get(key) != value for key, value in (new | more).items()):
        if known:
            MetadataCatalog.remove(name)
            known.pop("name")
        MetadataCatalog.get(name).set(**known | new | more)


@dataclass(frozen=True)
class StandardForm:
    """A file in the form that COCO's evaluation reads; the metadata of a data set has it as ``derived``.

    Attributes:
        json_file: the file.
        classes: class names in the order of the class indices.
    """

    json_file: str
    classes: tuple[str, ...]

    def annotations(self) -> dict:
        return read_coco_file(self.json_file).with_classes(self.classes).standard_content()


def dataset_names(recipe: DictConfig, part: str) -> list[str]:
    """Return the names of a recipe's data sets, and register those that the recipe registers.

    Args:
        recipe: a recipe, possibly without data.
        part: "train" or "test".

    Returns:
        list[str]: names in ``dataloader.<part>.dataset.names``; empty if the recipe has no such key.

    Raises:
        InputError: the key is there, but no name.
    """
    key = f"dataloader.{part}.dataset"
    node = OmegaConf.select(recipe, key, default=None)
    if not OmegaConf.is_dict(node) or "names" not in node:
        return []
    if not (names := _as_list(node.names)):
        raise InputError(f"{key}.names", "none", "a data set's name, or a list of names")
    return names


def training_records(
    names: str | Sequence[str], filter_empty: bool = True, proposal_files=None, **options
) -> list[dict]:
    """Return the dataset dicts of data sets, each with the name of its set, for training.

    It takes the place of Detectron2's ``get_detection_dataset_dicts``, whose arguments these are, in recipes.

    Args:
        names: one or more registered names.
        filter_empty: whether to leave out images that have no object but crowds.
        proposal_files: a file of proposals for each set.
        options: other arguments of ``get_detection_dataset_dicts``.

    Raises:
        InputError: a data set has no image with an object, and ``filter_empty``.
    """
    names, found = [names] if isinstance(names, str) else list(names), []
    for k, name in enumerate(names):
        files = None if proposal_files is None else [proposal_files[k]]
        records = get_detection_dataset_dicts(
            [name], filter_empty=False, proposal_files=files, **options
        )
        if not isinstance(records, list):  # map-style data sets, whose images are read one by one
            return get_detection_dataset_dicts(
                names, filter_empty, proposal_files=proposal_files, **options
            )
        if filter_empty and "annotations" in records[0]:
            records = filter_images_with_only_crowd_annotations(records)
        if not records:
            expected = "at least one, or dataset.filter_empty=False"
            raise InputError(f"data set {name!r}", "no image with an object", expected)
        found += [{**record, DATASET_NAME: name} for record in records]
    return found


def training_classes(recipe: DictConfig) -> tuple[str, ...] | None:
    """Return the class names of a recipe's training data; None if they have none, or are not there."""
    with contextlib.suppress(InputError, OSError):
        names = labelled_names(dataset_names(recipe, "train"))
        return class_names(names[0]) if names else None  # a name alone is never a class
    return None


def _as_list(names) -> list[str]:
    """Build config nodes among names, and return the names as a list."""
    names = instantiate(names)
    names = [names] if names is None or isinstance(names, str | int | float) else list(names)
    return [name if isinstance(name, str) else repr(name) for name in names if name is not None]


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
        _check_registered_coco(name)
        _check_own_function(name)
        if metadata.get("dirname") is not None and metadata.get("split") is not None:
            check_voc(metadata.dirname, metadata.split, tuple(metadata.thing_classes))
            refresh_voc(name)
    return names


def _check_registered_coco(name: str) -> None:
    """Check a set that d2kd or Detectron2's ``register_coco_instances`` registered, which then is read as d2kd reads it."""
    metadata, load = MetadataCatalog.get(name), DatasetCatalog[name]
    if load.__module__ == "detectron2.data.datasets.coco":
        given = (metadata.json_file, metadata.image_root, None)
        load = partial(_load_coco, name, *given)
        DatasetCatalog.remove(name)
        DatasetCatalog.register(name, load)
    if isinstance(load, partial) and load.func is _load_coco:
        _set_coco_metadata(name, _check_coco(*load.args[1:]))
    elif metadata.get("evaluator_type") == "coco" and metadata.get("image_root") is not None:
        _check_coco(metadata.json_file, metadata.image_root, None)


def _check_own_function(name: str) -> None:
    """Check that a function that someone else registered returns dataset dicts; a loader checks their content."""
    load = DatasetCatalog[name]
    if str(getattr(getattr(load, "func", load), "__module__", "")).startswith(
        ("d2kd.", "detectron2.data.datasets.pascal")
    ):
        return
    expected = "a function that returns a list of Detectron2's dataset dicts"
    try:
        records = DatasetCatalog.get(name)
    except InputError:
        raise
    except Exception as error:  # of someone else's code
        found = f"cannot be loaded ({type(error).__name__}: {error})"
        raise InputError(f"data set {name!r}", found, expected) from error
    if not isinstance(records, list | tuple):
        raise InputError(f"data set {name!r}", f"a {type(records).__name__}", expected)
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            found = f"record {number} is a {type(record).__name__}"
            raise InputError(f"data set {name!r}", found, expected)


def _check_coco(json_file: str, image_root: str, classes: tuple[str, ...] | None) -> CocoFile:
    """Check a file and that its images are there; return its summary."""
    _check_image_root(json_file, image_root)
    file = summarize_coco_file(json_file).with_classes(classes)
    check_files(file.file_names, image_root, f"every image that {json_file} names")
    return file


def _check_image_root(json_file: str, image_root: str) -> None:
    if not PathManager.isdir(image_root):
        raise InputError(image_root, "no such folder", f"the folder with the images of {json_file}")


def check_same_classes(train: Sequence[str], test: Sequence[str]) -> None:
    """Check that checked data sets have the same classes in the same order, as far as they name them.

    A test set may have further classes if the first training set is an increment.

    Raises:
        InputError: naming the data set and the first difference.
    """
    if not train or not (first := MetadataCatalog.get(train[0]).get("thing_classes")):
        return
    grows = MetadataCatalog.get(train[0]).get("incremental_split") is not None
    for name in (*train[1:], *test):
        classes = MetadataCatalog.get(name).get("thing_classes") or first
        if grows and name in test:
            classes = classes[: len(first)]
        if list(classes) == list(first):
            continue
        expected = f"the classes of data set {train[0]!r}: {quoted(first)}"
        lacking = [one for one in first if one not in classes]
        further = [one for one in classes if one not in first]
        if lacking and further:
            found = f"no class {quoted(lacking)}, but {quoted(further)}"
        elif lacking:
            found = f"no class {quoted(lacking)}"
            expected += "; with classes=[…] of coco_dataset a file may lack some"
        elif further:
            found = f"further classes {quoted(further)}"
        else:
            k = next(k for k, (a, b) in enumerate(zip(classes, first)) if a != b)
            found = f"class {k} is {classes[k]!r}, not {first[k]!r}"
            expected += "; with classes=[…] of coco_dataset files may have any order"
        raise InputError(f"data set {name!r}", found, expected)


def check_has_objects(names: Sequence[str]) -> None:
    """Check that training data have an object to learn from: no crowd, with a class and an area.

    Raises:
        InputError: if none of the data sets has one.
    """
    for name in names:
        if (count := MetadataCatalog.get(name).get("num_objects")) is None:
            count = any(
                not one.get("iscrowd", 0)
                for record in DatasetCatalog.get(name)
                for one in record.get("annotations") or ()
            )
        if count:
            return
    if names:
        found = "no object to learn from: all are crowds, have no area, or there are none"
        raise InputError(f"training data {', '.join(names)}", found, "at least one object")


def check_masks(loader: Iterable, needed: bool = False) -> None:
    """Check that every object has a mask that the mapper can read, if a training loader's mapper reads masks.

    Loaders and mappers that are not Detectron2's or this package's are not checked.

    Args:
        loader: any loader.
        needed: whether the detector learns masks.

    Raises:
        InputError: naming the first image, and the number of objects; or the mapper reads no masks that are needed.
    """
    mapped = getattr(loader, "dataset", None)
    mapper = reading_mapper(getattr(mapped, "mapper", None))
    if not isinstance(mapper, DatasetMapper):
        return
    if not mapper.use_instance_mask:
        if needed:
            key = "dataloader.train.mapper.use_instance_mask"
            expected = "True; or model.roi_heads.mask_head=null"
            raise InputError(key, "False, and a detector with a mask head", expected)
        return
    polygons = mapper.instance_mask_format == "polygon"
    without, others, first = 0, 0, {}
    for record in mapped.dataset:
        for one in record.get("annotations", ()):
            mask = one.get("segmentation")
            if one.get("iscrowd", 0):
                continue
            if not mask:
                without += 1
                first.setdefault("without", record["file_name"])
            elif polygons and isinstance(mask, dict):
                others += 1
                first.setdefault("others", record["file_name"])
    if without:
        expected = "a mask for each object; or a detector and a mapper without masks"
        raise InputError(first["without"], f"{without} objects of the data have no mask", expected)
    if others:
        expected = "polygons; or dataloader.train.mapper.instance_mask_format=bitmask"
        raise InputError(first["others"], f"{others} masks of the data are RLE", expected)


def shared_images(train: Sequence[str], test: Sequence[str]) -> list[str]:
    """Return the files of test images that are training images, too; none if the sets are the same on purpose."""
    if set(train) == set(test):
        return []
    files = {file for name in train for file in image_files(name)}
    return [file for name in test for file in image_files(name) if file in files]


def image_files(name: str) -> Sequence[str]:
    """Return the image files of a registered data set."""
    files = MetadataCatalog.get(name).get("image_files")  # of a large file, without its annotations
    records = () if files else DatasetCatalog.get(name)
    return files or [str(record["file_name"]) for record in records if "file_name" in record]


def sample_evenly(records: Sequence[dict], number: int) -> list[dict]:
    """Return ``number`` evenly spaced records in their order, or all if there are fewer."""
    if number >= len(records):
        return list(records)
    indices = np.unique(np.linspace(0, len(records) - 1, number).round().astype(int))
    return [records[i] for i in indices]
