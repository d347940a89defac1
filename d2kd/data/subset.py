"""A part of a registered data set, such as the images whose labels a student may see.

The images are the first ones of a random order that depends only on their number and on a seed. Files are often sorted
by class, scene or date, so the first ones in file order, or every tenth, are not typical. And of two subsets with the
same seed the smaller is in the larger one, which makes learning curves comparable.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..utils.errors import InputError
from .catalog import ANNOTATIONS_PREFIX, is_registered
from .datasets import check_dataset

# Metadata of the whole data set by which check_dataset would check the files of images that the subset lacks.
_NOT_COPIED = ("name", "image_root", "dirname", "split", "json_file", "prepare", "registered_as")
_NOT_COPIED += ("num_objects", "image_files", "oddities", "derived")


def subset(
    dataset: str, images: int, *, complement: bool = False, seed: int = 0, name: str | None = None
) -> str:
    """Register some images of a registered data set and return its name, for use in a config::

        dataloader.train.dataset.names = L(subset)(dataset="shapes_train", images=150)

    The images are random, but the same in every process, and stay in the order of the data set. Of two subsets with
    the same seed the smaller is in the larger one. Nothing is read before the data set is loaded or checked.

    Args:
        dataset: a COCO-style, VOC-style or generated data set, or an increment of one.
        images: number of images.
        complement: register all other images instead.
        seed: seed of the random order.
        name: name to register; by default from the other arguments, such as ``shapes_train_150_images``,
            ``shapes_train_without_150_images`` and ``shapes_train_150_images_seed1``.

    Raises:
        InputError: if there is no such data set, the number or the seed is invalid, or the name is taken; while
            loading, if the data set has too few images.
    """
    if dataset not in DatasetCatalog.list():
        raise InputError("dataset of subset", repr(dataset), "a registered data set")
    for key, value, least in (("images", images, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InputError(f"{key} of subset", repr(value), f"a whole number from {least}")
    part = Subset(dataset, images, complement, seed)
    name = name or part.default_name
    if is_registered(name, (str(part), dataset)):
        return name
    DatasetCatalog.register(name, functools.partial(part.load, name))
    metadata = MetadataCatalog.get(dataset)
    own = {"derived": part, "prepare": functools.partial(_prepare, part, name)}
    own["registered_as"] = (str(part), dataset)
    if metadata.get("json_file") is not None:
        own["json_file"] = f"{ANNOTATIONS_PREFIX}{name}"
    MetadataCatalog.get(name).set(**_to_copy(dataset) | own)
    return name


@dataclass(frozen=True)
class Subset:
    """A subset of a data set, see :func:`subset`; its metadata has it as ``derived``."""

    dataset: str
    images: int
    complement: bool
    seed: int

    @property
    def default_name(self) -> str:
        name = f"{self.dataset}_{'without_' * self.complement}{self.images}_images"
        return f"{name}_seed{self.seed}" if self.seed else name

    def __str__(self) -> str:
        which = "all images but " if self.complement else ""
        return f"{which}{self.images} images, seed {self.seed},"

    def records(self) -> list[dict]:
        """Return the dataset dicts of the images.

        Raises:
            InputError: if the data set has too few images.
        """
        records = DatasetCatalog.get(self.dataset)
        most = len(records) - self.complement  # other images must remain
        if self.images > most:
            expected = f"at most {most}, since {self.dataset!r} has {len(records)}"
            raise InputError(f"subset of {self.dataset!r}", f"{self.images} images", expected)
        # RandomState, because later versions of NumPy may change Generator.permutation.
        order = np.random.RandomState(self.seed).permutation(len(records))
        chosen = order[self.images :] if self.complement else order[: self.images]
        return [records[i] for i in sorted(chosen)]

    def load(self, name: str) -> list[dict]:
        """Return :meth:`records`, and set the metadata."""
        records = self.records()
        self.set_metadata(name)
        return records

    def set_metadata(self, name: str) -> None:
        """Copy the metadata that the data set got while it was checked or loaded."""
        own = MetadataCatalog.get(name)
        own.set(**{k: v for k, v in _to_copy(self.dataset).items() if k not in own.as_dict()})

    def annotations(self) -> dict:
        """Return the annotations of the subset in COCO's format."""
        images = {record["image_id"] for record in self.records()}
        with PathManager.open(MetadataCatalog.get(self.dataset).json_file) as file:
            content = json.load(file)
        return {
            **content,
            "images": [one for one in content["images"] if one["id"] in images],
            "annotations": [a for a in content["annotations"] if a["image_id"] in images],
        }


def _to_copy(dataset: str) -> dict:
    content = MetadataCatalog.get(dataset).as_dict()
    return {key: value for key, value in content.items() if key not in _NOT_COPIED}


def _prepare(part: Subset, name: str) -> None:
    check_dataset(part.dataset)
    _check_count(part)
    part.set_metadata(name)


@functools.lru_cache  # as in check_dataset; exceptions are not cached
def _check_count(part: Subset) -> None:
    part.records()
