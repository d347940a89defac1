"""Data sets for class-incremental detection: the annotations of some classes of a data set, as a new data set.

The rule is that of ERD (arXiv 2204.02136) and its code: an increment has the annotations of its classes, and the
images with at least one of these. An image with objects of two increments is in both, each time with only the objects
of that increment; the other objects are background. A class has the same index in all increments, and classes of
earlier increments come first.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.utils.file_io import PathManager

from ..structures.class_map import class_names
from ..utils.errors import InputError
from .catalog import ANNOTATIONS_PREFIX, INCREMENT_KEY, is_registered
from .datasets import check_dataset

logger = logging.getLogger(__name__)

ERD_SPLITS = ("40+40", "50+30", "60+20", "70+10", "40+20+20", "40+10x4")
"""ERD's splits of COCO's 80 classes, which are in the order of their category ids."""

Split = str | Sequence[Sequence[str]]
"""Numbers of classes, in the data set's order, such as "40+20x2"; or the class names of each increment."""


def split_classes(classes: str | Sequence[str], split: Split) -> tuple[tuple[str, ...], ...]:
    """Return the classes of each increment.

    Args:
        classes: class names in their order, or the name of a registered data set.
        split: the number of classes in each increment, which must add up to all classes; or their names, in any
            order, where classes may be left out.

    Raises:
        InputError: if a number, a class or the data set does not exist, or a class is in two increments.
    """
    names = class_names(_loaded(classes) if isinstance(classes, str) else classes, "dataset")
    if isinstance(split, str):
        if not re.fullmatch(r"\d+(x\d+)?(\+\d+(x\d+)?)*", split):
            raise InputError("split", repr(split), "numbers of classes such as 40+20x2, or names")
        counts = [part.partition("x") for part in split.split("+")]
        sizes = [int(size) for size, _, times in counts for _ in range(int(times or 1))]
        if sum(sizes) != len(names) or not all(sizes):
            raise InputError(f"split {split}", f"{sum(sizes)} classes", f"{len(names)} in all")
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        return tuple(names[end - size : end] for size, end in zip(sizes, ends))
    increments = tuple(tuple(str(name) for name in increment) for increment in split)
    if not increments or not all(increments):
        raise InputError("split", "an increment without a class", "at least one class in each")
    for name, times in Counter(chain(*increments)).items():
        if name not in names:
            raise InputError("split", f"unknown class {name!r}", f"of {', '.join(names)}")
        if times > 1:
            where = [str(i) for i, increment in enumerate(increments, 1) if name in increment]
            raise InputError(
                "split",
                f"{name!r} in increment {' and '.join(where)}",
                "increments that do not overlap",
            )
    return increments


def incremental_split(
    dataset: str, split: Split, increment: int, *, cumulative: bool = False, name: str | None = None
) -> str:
    """Register an increment of a registered data set and return its name, for use in a config::

        dataloader.train.dataset.names = L(incremental_split)(dataset="coco_2017_train", split="40+40", increment=2)
        dataloader.test.dataset.names = L(incremental_split)(
            dataset="coco_2017_val", split="40+40", increment=2, cumulative=True
        )

    Nothing is read before the data set is loaded; loading logs the number of its images and boxes, and how many of
    the images are also in other increments. ``thing_classes`` are the classes of all increments. The ground truth
    of ``COCOEvaluator`` is filtered by the same rule.

    Args:
        dataset: a COCO-style, VOC-style or generated data set whose metadata has ``thing_classes``.
        split: see :func:`split_classes`.
        increment: which one, from 1.
        cumulative: include the classes of all increments up to this one, for evaluation. The last increment then has all
            images of the data set.
        name: name to register; by default from data set, split and increment, and from a hash if the split has
            another order of classes.

    Raises:
        InputError: if there is no such data set, class or increment, or the name is taken; while loading, if no
            image has an object of the increment.
    """
    increments = split_classes(dataset, split)
    if not 1 <= increment <= len(increments):
        raise InputError("increment", increment, f"from 1 to {len(increments)}")
    parts = "+".join(str(len(classes)) for classes in increments)
    if tuple(chain(*increments)) != class_names(dataset):  # another split may have the same counts
        parts += f"_{hashlib.sha256(json.dumps(increments).encode()).hexdigest()[:8]}"
    name = name or f"{dataset}_{parts}_{'cumulative' if cumulative else 'increment'}{increment}"
    given = (
        f"increment {increment} of {increments}{', cumulative' if cumulative else ''}",
        dataset,
    )
    if is_registered(name, given):
        return name
    part = Increment(dataset, increments, increment, cumulative)
    DatasetCatalog.register(name, functools.partial(part.load, name))
    MetadataCatalog.get(name).set(
        incremental_split=part,
        derived=part,
        thing_classes=list(part.order),
        seen_classes=list(chain(*increments[:increment])),
        evaluator_type="coco",
        json_file=f"{ANNOTATIONS_PREFIX}{name}",
        prepare=functools.partial(check_dataset, dataset),
        registered_as=given,
    )
    return name


@dataclass(frozen=True)
class Increment:
    """An increment of a data set; its metadata has it as ``incremental_split``.

    Attributes:
        dataset: name of the complete data set.
        increments: classes of each increment.
        index: this increment, from 1.
        cumulative: whether the classes of all increments up to this one are included, or only those of this one.
    """

    dataset: str
    increments: tuple[tuple[str, ...], ...]
    index: int
    cumulative: bool

    @property
    def order(self) -> tuple[str, ...]:
        """Classes of all increments, in the order of a detector's class indices."""
        return tuple(chain(*self.increments))

    @property
    def classes(self) -> tuple[str, ...]:
        """Classes whose annotations are kept."""
        return (
            tuple(chain(*self.increments[: self.index]))
            if self.cumulative
            else self.increments[self.index - 1]
        )

    @property
    def class_ids(self) -> dict[str, int]:
        """Detector's index of each of :attr:`classes`."""
        return {name: self.order.index(name) for name in self.classes}

    @property
    def filters_images(self) -> bool:
        return not (self.cumulative and self.index == len(self.increments))

    def load(self, name: str) -> list[dict]:
        """Return the dataset dicts of the increment."""
        # First, because loading adds the category ids to the metadata.
        records = DatasetCatalog.get(self.dataset)
        MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id = {
            id: k for k, id in enumerate(self._category_ids().values())
        }
        all_classes = MetadataCatalog.get(self.dataset).thing_classes
        number = [self.order.index(c) if c in self.order else -1 for c in all_classes]
        increment_of = [i for i, classes in enumerate(self.increments, 1) for _ in classes]
        wanted = set(self.class_ids.values())
        kept, boxes, elsewhere = [], 0, Counter()
        for record in records:
            annotations = record.get("annotations", ())
            labels = [number[a["category_id"]] for a in annotations]
            own = [{**a, "category_id": k} for a, k in zip(annotations, labels) if k in wanted]
            if not own and self.filters_images:
                continue
            kept.append({**record, "annotations": own})
            boxes += len(own)
            elsewhere.update({increment_of[k] for k in labels if k >= 0} if own else ())
        if not boxes:
            raise InputError(
                f"data set {name!r}", f"no object of {', '.join(self.classes)}", "at least one"
            )
        others = [f"{elsewhere[i]} in increment {i}" for i in range(1, len(self.increments) + 1)]
        if not self.cumulative:
            del others[self.index - 1]
        logger.info(
            "%s: increment %d of %d, %d classes%s: %d images, %d boxes; of these images %s",
            *(
                name,
                self.index,
                len(self.increments),
                len(self.classes),
                " cumulative" if self.cumulative else "",
            ),
            *(len(kept), boxes, ", ".join(others) or "all are here alone"),
        )
        return kept

    def _category_ids(self) -> dict[str, int]:
        """Return the category id of each class: the data set's ids, or new ones if these are not ascending.

        COCO's evaluation sorts classes by their ids.
        """
        metadata = MetadataCatalog.get(self.dataset)
        ids = metadata.get("thing_dataset_id_to_contiguous_id")
        id_of = {
            k: id for id, k in (ids or {}).items()
        }  # in VOC-style sets, the class index is the id
        known = {name: id_of.get(k, k) for k, name in enumerate(metadata.thing_classes)}
        ordered = {name: known[name] for name in self.order}
        if list(ordered.values()) == sorted(ordered.values()):
            return ordered
        return {name: k for k, name in enumerate(self.order, 1)}

    def annotations(self) -> dict:
        """Return the increment in COCO's format, with the categories of all increments."""
        DatasetCatalog.get(self.dataset)  # a generated one is drawn now
        file = MetadataCatalog.get(self.dataset).get("json_file")
        if file is None:
            content = convert_to_coco_dict(self.dataset)
        else:
            with PathManager.open(file) as opened:
                content = json.load(opened)
        named = {one["id"]: one["name"] for one in content["categories"]}
        ids = self._category_ids()
        kept = [
            {**a, "category_id": ids[named[a["category_id"]]]}
            for a in content.get("annotations", ())
            if named[a["category_id"]] in self.classes
        ]
        images = {a["image_id"] for a in kept}
        return {
            **content,
            "categories": [{"id": id, "name": name} for name, id in ids.items()],
            "annotations": kept,
            "images": [
                one for one in content["images"] if one["id"] in images or not self.filters_images
            ],
            INCREMENT_KEY: list(self.classes),
        }


def check_annotated_classes(
    names: Sequence[str], num_classes: int, num_old_classes: int = 0
) -> None:
    """Check that all training objects have a class of the detector, and only new classes.

    If the data sets have class names, their number is compared. Objects are read, too, if some classes are old, or if
    there is no annotation file, whose classes :func:`~d2kd.data.check_dataset` has compared.

    Args:
        names: names of the data sets.
        num_classes: number of the detector's classes.
        num_old_classes: number of its old classes, which are the first ones.

    Raises:
        InputError: naming the data set, or the image, and the class; or the number of classes.
    """
    for name in names:
        metadata = MetadataCatalog.get(name)
        part, classes = metadata.get("incremental_split"), metadata.get("thing_classes")
        if part is not None:
            for c, k in part.class_ids.items():
                if k < num_old_classes:
                    expected = f"new ones alone: {', '.join(part.order[num_old_classes:])}"
                    raise InputError(f"data set {name!r}", f"has {c!r}, an old class", expected)
            check_num_classes(name, num_classes, least=max(part.class_ids.values()) + 1)
            continue
        if classes:
            check_num_classes(name, num_classes, least=len(classes))
            file = metadata.get("json_file") or metadata.get("dirname")
            if file is not None and not num_old_classes:
                continue
        for record in DatasetCatalog.get(name):
            for one in record.get("annotations", ()):
                k = one["category_id"]
                if num_old_classes <= k < num_classes or one.get("iscrowd", 0):
                    continue
                called = repr(classes[k]) if classes and k < len(classes) else f"class {k}"
                raise InputError(
                    f"data set {name!r}: {record['file_name']}",
                    f"an object of {called}, "
                    + ("an old class" if k < num_old_classes else "which the detector lacks"),
                    f"classes from {num_old_classes} to {num_classes - 1}",
                )


def check_num_classes(name: str, num_classes: int, least: int) -> None:
    """Raise InputError unless a detector has at least ``least`` classes, and no more than the data set.

    A data set without class names has no upper limit.
    """
    most = len(MetadataCatalog.get(name).get("thing_classes") or ()) or num_classes
    if not least <= num_classes <= most:
        count = f"{most}" if least == most else f"from {least} to {most}"
        expected = f"{count}, as data set {name!r} has"
        raise InputError("num_classes", f"{num_classes} of the student", expected)


def _loaded(name: str) -> str:
    """Load a data set without class names, as some get them while they are loaded; return its name."""
    if name in DatasetCatalog.list() and not MetadataCatalog.get(name).get("thing_classes"):
        DatasetCatalog.get(name)
    return name
