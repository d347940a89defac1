"""Classes learned in steps: the part of a data set that is about some of its classes, as a data set of its own.

The published rule (ERD, arXiv 2204.02136, and its code): of the classes of a step keep their annotations, and the
images that have at least one of these. An image with objects of two steps is in both, each time with that step's
objects alone; what the other step labels is background. Classes keep one numbering through all steps: the first
step's first.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import logging
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.utils.file_io import PathHandler, PathManager

from d2kd.data.catalog import is_registered
from d2kd.data.datasets import check_dataset
from d2kd.structures.class_map import class_names
from d2kd.utils.errors import InputError

logger = logging.getLogger(__name__)

PUBLISHED_SPLITS = ("40+40", "50+30", "60+20", "70+10", "40+20+20", "40+10x4")
"""Of COCO's 80 classes in the order of their category ids."""

Split = str | Sequence[Sequence[str]]
"""Numbers of classes, in the data set's order, such as "40+20x2"; or the names of each step's classes."""


def split_classes(classes: str | Sequence[str], split: Split) -> tuple[tuple[str, ...], ...]:
    """The classes of each step.

    Args:
        classes: names in their order, or a registered data set that has them.
        split: how many each step takes, which must be all together; or the names for each step, in any order,
            where classes may be left out.

    Raises:
        InputError: a number of classes, a name or a data set is wrong, or a class is in two steps.
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
    steps = tuple(tuple(str(name) for name in step) for step in split)
    if not steps or not all(steps):
        raise InputError("split", "a step without a class", "at least one class in each")
    for name, times in Counter(chain(*steps)).items():
        if name not in names:
            raise InputError("split", f"unknown class {name!r}", f"of {', '.join(names)}")
        if times > 1:
            where = [str(i) for i, step in enumerate(steps, 1) if name in step]
            raise InputError(
                "split", f"{name!r} in step {' and '.join(where)}", "steps that do not overlap"
            )
    return steps


def class_step(
    dataset: str, split: Split, step: int, *, seen: bool = False, name: str | None = None
) -> str:
    """Register a step of a registered data set and return its name: a config says it where one is expected::

        dataloader.train.dataset.names = L(class_step)(dataset="coco_2017_train", split="40+40", step=2)
        dataloader.test.dataset.names = L(class_step)(
            dataset="coco_2017_val", split="40+40", step=2, seen=True
        )

    Nothing is read before the step is loaded; loading logs its images and boxes, and how many of the images are
    in other steps, too. ``thing_classes`` are those of all steps, and what ``COCOEvaluator`` compares with is
    filtered by the same rule.

    Args:
        dataset: COCO-style, VOC-style or generated, its metadata with ``thing_classes``.
        split: see :func:`split_classes`.
        step: from 1.
        seen: all classes up to this step, to measure a detector with. At the last step no image is left out.
        name: to register; of data set, split and step by default; of a split in another order, a hash, too.

    Raises:
        InputError: there is no such data set, class or step, or the name is taken; when it is loaded, no image
            has an object of the step.
    """
    steps = split_classes(dataset, split)
    if not 1 <= step <= len(steps):
        raise InputError("step", step, f"from 1 to {len(steps)}")
    parts = "+".join(str(len(classes)) for classes in steps)
    if tuple(chain(*steps)) != class_names(dataset):  # their counts alone could be another split's
        parts += f"_{hashlib.sha256(json.dumps(steps).encode()).hexdigest()[:8]}"
    name = name or f"{dataset}_{parts}_{'seen' if seen else 'step'}{step}"
    given = (f"step {step} of {steps}{', seen' if seen else ''}", dataset)
    if is_registered(name, given):
        return name
    part = ClassStep(dataset, steps, step, seen)
    DatasetCatalog.register(name, functools.partial(part.load, name))
    MetadataCatalog.get(name).set(
        class_step=part,
        thing_classes=list(part.order),
        seen_classes=list(chain(*steps[:step])),
        evaluator_type="coco",
        json_file=f"{_PREFIX}{name}",
        prepare=functools.partial(check_dataset, dataset),
        registered_as=given,
    )
    return name


@dataclass(frozen=True)
class ClassStep:
    """What a registered step is made of, its metadata's ``class_step``.

    Attributes:
        dataset: the whole one.
        steps: classes of each step.
        step: from 1.
        seen: whether it has the classes up to this step, or this step's alone.
    """

    dataset: str
    steps: tuple[tuple[str, ...], ...]
    step: int
    seen: bool

    @property
    def order(self) -> tuple[str, ...]:
        """Classes of all steps; class k of a detector is the k-th."""
        return tuple(chain(*self.steps))

    @property
    def classes(self) -> tuple[str, ...]:
        """Those whose annotations are kept."""
        return tuple(chain(*self.steps[: self.step])) if self.seen else self.steps[self.step - 1]

    @property
    def numbers(self) -> dict[str, int]:
        """The same by the numbers that a detector has for them."""
        return {name: self.order.index(name) for name in self.classes}

    @property
    def filters_images(self) -> bool:
        return not (self.seen and self.step == len(self.steps))

    def load(self, name: str) -> list[dict]:
        """Detectron2's dataset dicts, filtered."""
        records = DatasetCatalog.get(
            self.dataset
        )  # first: loading tells the metadata its category ids
        MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id = {
            id: k for k, id in enumerate(self._category_ids().values())
        }
        theirs = MetadataCatalog.get(self.dataset).thing_classes
        number = [self.order.index(c) if c in self.order else -1 for c in theirs]
        step_of = [i for i, classes in enumerate(self.steps, 1) for _ in classes]
        wanted = set(self.numbers.values())
        kept, boxes, elsewhere = [], 0, Counter()
        for record in records:
            every = [number[a["category_id"]] for a in record.get("annotations", ())]
            mine = [
                {**a, "category_id": k}
                for a, k in zip(record.get("annotations", ()), every)
                if k in wanted
            ]
            if not mine and self.filters_images:
                continue
            kept.append({**record, "annotations": mine})
            boxes += len(mine)
            elsewhere.update({step_of[k] for k in every if k >= 0} if mine else ())
        if not boxes:
            raise InputError(
                f"data set {name!r}", f"no object of {', '.join(self.classes)}", "at least one"
            )
        others = [f"{elsewhere[i]} in step {i}" for i in range(1, len(self.steps) + 1)]
        if not self.seen:
            del others[self.step - 1]
        logger.info(
            "%s: step %d of %d, %d classes%s: %d images, %d boxes; of these images %s",
            *(name, self.step, len(self.steps), len(self.classes), " seen" if self.seen else ""),
            *(len(kept), boxes, ", ".join(others) or "all are here alone"),
        )
        return kept

    def _category_ids(self) -> dict[str, int]:
        """Ids of the classes in their order: the data set's own, or new ones where those are not ascending.

        COCO's evaluation sorts classes by their ids.
        """
        metadata = MetadataCatalog.get(self.dataset)
        ids = metadata.get("thing_dataset_id_to_contiguous_id")
        of = {k: id for id, k in (ids or {}).items()}  # VOC's classes are their own ids
        theirs = {name: of.get(k, k) for k, name in enumerate(metadata.thing_classes)}
        own = {name: theirs[name] for name in self.order}
        if list(own.values()) == sorted(own.values()):
            return own
        return {name: k for k, name in enumerate(self.order, 1)}

    def annotations(self) -> dict:
        """The step in COCO's format: all its classes, but annotations and images of its own."""
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
            STEP_KEY: list(self.classes),
        }


def check_objects(names: Sequence[str], num_classes: int, num_old_classes: int = 0) -> None:
    """Look whether the objects that a detector is to learn are of its classes, and of new ones alone.

    Classes are counted where the data name them. Where that leaves a doubt, objects are read, too: where some classes
    are old, and where no file of annotations says that there are no others.

    Args:
        names: of data sets.
        num_classes: the detector's.
        num_old_classes: how many of them, the first ones, it has learned before.

    Raises:
        InputError: naming the data set, or the image, and the class; or how many classes there are.
    """
    for name in names:
        metadata = MetadataCatalog.get(name)
        part, classes = metadata.get("class_step"), metadata.get("thing_classes")
        if part is not None:
            for c, k in part.numbers.items():
                if k < num_old_classes:
                    expected = f"new ones alone: {', '.join(part.order[num_old_classes:])}"
                    raise InputError(f"data set {name!r}", f"has {c!r}, an old class", expected)
            check_count(name, num_classes, least=max(part.numbers.values()) + 1)
            continue
        if classes:
            check_count(name, num_classes, least=len(classes))
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


def check_count(name: str, num_classes: int, least: int) -> None:
    """Raise InputError unless a detector has at least so many classes, and no more than the data set names.

    A data set that names none takes any.
    """
    most = len(MetadataCatalog.get(name).get("thing_classes") or ()) or num_classes
    if not least <= num_classes <= most:
        count = f"{most}" if least == most else f"from {least} to {most}"
        expected = f"{count}, as data set {name!r} has"
        raise InputError("num_classes", f"{num_classes} of the student", expected)


STEP_KEY = "d2kd_step"
"""In an annotation file: the classes it is about, where its list of categories has more."""

_PREFIX = "d2kd_step://"


class _Annotations(PathHandler):
    """``d2kd_step://NAME``: the step's annotations as a file, made when somebody asks, so training never does."""

    def _get_supported_prefixes(self) -> list[str]:
        return [_PREFIX]

    def _get_local_path(self, path: str, **_) -> str:
        part = MetadataCatalog.get(path.removeprefix(_PREFIX)).class_step
        return _written(part, MetadataCatalog.get(part.dataset).get("json_file"))

    def _isfile(self, path: str, **_) -> bool:
        return path.removeprefix(_PREFIX) in DatasetCatalog.list()

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **options):
        options = {k: v for k, v in options.items() if k in ("encoding", "newline")}
        return open(self._get_local_path(path), mode, buffering, **options)


PathManager.register_handler(_Annotations())


@functools.cache
def _written(part: ClassStep, source: str | None) -> str:
    """The file, which lives as long as this process; another one where the source has moved."""
    folder = tempfile.mkdtemp(prefix="d2kd_step_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    file = Path(folder, "annotations.json")
    file.write_text(json.dumps(part.annotations()))
    return str(file)


def _loaded(name: str) -> str:
    """The data set's name; its metadata has class names from now on, as some have only when they are loaded."""
    if name in DatasetCatalog.list() and not MetadataCatalog.get(name).get("thing_classes"):
        DatasetCatalog.get(name)
    return name
