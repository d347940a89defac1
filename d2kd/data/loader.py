"""Data loaders in which all randomness depends only on (seed, sample position).

Runs with the same seed get the same images with the same augmentations. This does not depend on the
number of workers, on random numbers drawn before, or on a resume, so compared runs differ only in
the method. Detectron2's loaders draw from each worker's global generators, so there it does depend on these.

A *position* counts the samples of all processes from the start of training; epoch e has positions
e·n to (e+1)·n, for n images. With a ratio of data sets, an epoch has as many positions as its draws.

Labelled and unlabelled images have a stream each, with positions of its own. A batch is of one kind, the same one in all
processes, by its number alone. So the labelled batches are those of a run without the unlabelled images.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
import math
import os
import random
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real

import numpy as np
import torch
from detectron2.data import (
    DatasetFromList,
    build_detection_test_loader,
    build_detection_train_loader,
    detection_utils,
    get_detection_dataset_dicts,
)
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import InferenceSampler
from detectron2.structures import BoxMode
from detectron2.utils import comm
from detectron2.utils.registry import locate
from omegaconf import OmegaConf
from torch.utils.data import DataLoader, Dataset, Sampler

from ..utils.errors import InputError
from .datasets import DATASET_NAME, UNLABELLED, training_records
from .images import (
    check_image,
    check_image_format,
    check_record,
    read_image,
    reads_by_these_rules,
)

_ORDER, _SAMPLE, _ROUNDING = range(3)  # keys of independent random streams
_KEYS = 3  # by which those of unlabelled images differ

_MOST_DRAWS = 100_000_000
"""In an epoch: its order needs 16 bytes for each."""


def build_train_loader(
    dataset: Sequence[dict] | Dataset,
    *,
    mapper: Callable[[dict], dict | None],
    total_batch_size: int,
    seed: int | None = 0,
    start: int = 0,
    num_workers: int = 0,
    aspect_ratio_grouping: bool = True,
    ratio: Sequence[float] | None = None,
) -> DataLoader:
    """Build an infinite loader, like Detectron2's ``build_detection_train_loader``.

    With a ``ratio``, an image of data set s is drawn c w_s / n_s times in an epoch, with the set's entry w_s and number of
    images n_s, and c such that this is 1 for the set that is drawn least often. What is no whole number is rounded up or
    down at random, for each image and epoch, as by Detectron2's ``RepeatFactorTrainingSampler``.

    Where some images are unlabelled, a batch has either labelled or unlabelled ones. Both kinds are spread evenly, in the
    ratio of their sets' entries, or without a ``ratio`` of their images. The first batch is labelled.

    Args:
        dataset: dataset dicts in Detectron2's format, or a map-style dataset of them.
        mapper: maps a dataset dict to a sample, or to None to use the next image instead.
        total_batch_size: images per iteration over all processes.
        seed: seed of all randomness; None or negative: a random one, as in Detectron2.
        start: number of completed iterations; the loader continues exactly from there.
        aspect_ratio_grouping: whether a batch has either only wide or only tall images.
        ratio: relative numbers of images of each data set, in expectation, in the order of the sets in ``dataset``, whose
            dicts are those of :func:`~d2kd.data.training_records`. None: each image once in an epoch.

    Returns:
        DataLoader: of lists of ``total_batch_size / world size`` samples.

    Raises:
        InputError: an argument is invalid.
    """
    world = comm.get_world_size()
    if not isinstance(total_batch_size, int):
        raise InputError("total_batch_size", repr(total_batch_size), "an integer")
    if total_batch_size < 1 or total_batch_size % world:
        expected = f"a positive multiple of the {world} process(es)"
        raise InputError("total_batch_size", total_batch_size, expected)
    if len(dataset) == 0:
        raise InputError("the training set", "no image", "at least one")
    if seed is None or seed < 0:
        seed = comm.shared_random_seed()
    groups = _orientations(dataset) if aspect_ratio_grouping else None
    sets = _DataSets.of(dataset)
    entries = None if ratio is None else sets.check_ratio(ratio)
    batches = _TrainingBatches(sets, entries, total_batch_size // world, seed, start, groups)
    return _Loader(
        _Mapped(dataset, mapper, seed, sets.unlabelled),
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=trivial_batch_collator,
        generator=torch.Generator(),  # otherwise, starting to iterate draws from the global one
        worker_init_fn=obey_parent_alone,
    )


def build_test_loader(
    dataset: Sequence[dict] | Dataset,
    *,
    mapper: Callable[[dict], dict],
    sampler: Iterable[int] | None = None,
    batch_size: int = 1,
    num_workers: int = 0,
    raise_errors: bool = True,
) -> DataLoader:
    """Build a loader of every image once, with Detectron2's ``InferenceSampler`` by default.

    Args:
        sampler: indices for this process, instead of the default.
        batch_size: maximum images per batch. More than 1 suits small detectors and images of one size; others are
            padded to the largest of their batch, which may change the detections.
        raise_errors: whether an image that cannot be read raises its :class:`InputError`. If not, the error is in the
            batch in place of the sample.
    """
    if len(dataset) == 0:
        raise InputError("the test set", "no image", "at least one")
    if batch_size < 1:
        raise InputError("batch_size", batch_size, "at least 1")
    indices = InferenceSampler(len(dataset)) if sampler is None else sampler
    positions = [(index, index) for index in indices]
    return (_Loader if raise_errors else DataLoader)(
        _Mapped(dataset, mapper, seed=0),
        batch_sampler=[
            positions[first : first + batch_size] for first in range(0, len(positions), batch_size)
        ],
        num_workers=num_workers,
        collate_fn=trivial_batch_collator,
        generator=torch.Generator(),
    )


def dataset_of(loader: Iterable) -> Sequence[dict] | None:
    """Return the dataset dicts from which a loader of this module is built; None for another loader."""
    mapped = getattr(loader, "dataset", None)
    return mapped.dataset if isinstance(mapped, _Mapped) else None


def has_unlabelled(loader: Iterable) -> bool:
    """Return whether a loader of this module has images without labels; False for another loader."""
    sampler = getattr(loader, "batch_sampler", None)
    return isinstance(sampler, _TrainingBatches) and bool(sampler.sets.unlabelled.any())


def images_used(loader: Iterable, batches: int) -> dict[str, int] | None:
    """Return how many images of each data set the first batches of all processes have.

    They are counted in the stream that a loader of this module draws from.

    Args:
        loader: any loader.
        batches: number of batches of a process, from the start of training.

    Returns:
        dict: data set -> images; None for another loader, or if dataset dicts do not say their data set.
    """
    sampler = getattr(loader, "batch_sampler", None)
    if not isinstance(sampler, _TrainingBatches) or None in sampler.sets.names:
        return None
    return dict(zip(sampler.sets.names, sampler.count(batches).tolist()))


def check_sample(loader: Iterable, key: str, num_classes: int | None = None) -> None:
    """Check what the mapper of a loader of this module makes of the first image of each kind, before a run begins.

    Args:
        loader: any loader; others are not checked.
        key: the recipe's key of the loader.
        num_classes: number of the detector's classes, if it learns from these samples; otherwise None.

    Raises:
        InputError: the mapper fails, or returns something else than Detectron2's detectors read.
    """
    mapped = getattr(loader, "dataset", None)
    if not isinstance(mapped, _Mapped):
        return
    unlabelled = mapped.unlabelled
    if not unlabelled.all():
        _check_sample(mapped, int(unlabelled.argmin()), key, num_classes)
    if unlabelled.any():
        _check_sample(mapped, int(unlabelled.argmax()), key, None)


def _check_sample(mapped: _Mapped, index: int, key: str, num_classes: int | None) -> None:
    try:
        sample = mapped[0, index]
    except Exception as error:  # of someone else's code
        found = f"fails ({type(error).__name__}: {error})"
        expected = "a function from a dataset dict to a sample; --debug shows the traceback"
        raise InputError(f"{key}.mapper", found, expected) from error
    if isinstance(sample, InputError):
        raise sample
    if fault := _sample_fault(sample, num_classes):
        raise InputError(f"{key}.mapper", f"returns {fault[0]}", fault[1])


def _sample_fault(sample, num_classes: int | None) -> tuple[str, str] | None:
    """Return what is found instead of a sample, and what is expected."""
    if not isinstance(sample, dict):
        return f"a {type(sample).__name__}", "a dict with the image, a tensor"
    image = sample.get("image")
    shape = [*getattr(image, "shape", ())]
    if not isinstance(image, torch.Tensor) or len(shape) != 3 or shape[0] > 4 >= shape[2]:
        kind = "none" if image is None else f"a {type(image).__name__} of shape {shape}"
        return f"as 'image' {kind}", "a tensor (channels, height, width)"
    if num_classes is None:
        return None
    if "instances" not in sample:
        return "no 'instances'", "those of the image, with gt_boxes and gt_classes"
    labels = sample["instances"].gt_classes
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        return f"classes {labels.tolist()}", f"classes from 0 to {num_classes - 1}"
    return None


def use_seeded_loaders(dataloader, *, seed: int | None, start: int | None = None) -> None:
    """Replace Detectron2's loaders in a recipe's ``dataloader`` node by those of this module, in place.

    Recipes of the model zoo thus become reproducible. A node with an option that these loaders lack,
    such as a custom sampler or collate function, is left unchanged with a warning. ``seed`` is the
    default of training nodes without one; ``start`` is set in any case.
    """
    tests = dataloader.get("test") or []
    for node in tests if OmegaConf.is_list(tests) else [tests]:
        if OmegaConf.is_dict(node) and node:
            _replace(node, build_detection_test_loader, build_test_loader)
    train = dataloader.get("train")
    if OmegaConf.is_dict(train) and train:
        _replace(train, build_detection_train_loader, build_train_loader)
        if OmegaConf.is_dict(train.get("dataset")):
            _replace(train.dataset, get_detection_dataset_dicts, training_records)
        if train.get("ratio") is not None and _target(train) is build_detection_train_loader:
            found = "beside options that Detectron2's loader has alone"
            raise InputError("dataloader.train.ratio", found, "d2kd's build_train_loader")
        if _target(train) is build_train_loader:
            if start is not None:
                train["start"] = start
            # An interpolation of a `train.seed` that does not exist counts as no seed, too.
            if OmegaConf.select(train, "seed", throw_on_resolution_failure=False) is None:
                train["seed"] = seed


def _target(node) -> object:
    target = node.get("_target_")
    return locate(target) if isinstance(target, str) else target


def _replace(node, old: Callable, new: Callable) -> None:
    if _target(node) is not old:
        return
    unknown = sorted(node.keys() - inspect.signature(new).parameters.keys() - {"_target_"})
    used = [name for name in unknown if node[name] is not None]
    if used:
        logging.getLogger(__name__).warning(
            f"Detectron2's {old.__name__} stays because of {', '.join(used)}: "
            "its random draws depend on the number of workers"
        )
        return
    for name in unknown:
        del node[name]
    node["_target_"] = f"{new.__module__}.{new.__qualname__}"


def _seeds(*key: int) -> np.ndarray:
    """Hash a key to 8 seed words, which are the same on every machine."""
    return np.random.SeedSequence(key).generate_state(8)


@contextlib.contextmanager
def seeded_rng(*key: int) -> Iterator[None]:
    """Seed the global generators of NumPy, Python and torch (CPU), and restore them at the end."""
    former = np.random.get_state(), random.getstate(), torch.default_generator.get_state()
    words = _seeds(*key)
    np.random.seed(words)
    random.seed(int(words[0]) << 32 | int(words[1]))
    torch.default_generator.manual_seed(int(words[2]) << 31 | int(words[3]) >> 1)
    try:
        yield
    finally:
        np.random.set_state(former[0])
        random.setstate(former[1])
        torch.default_generator.set_state(former[2])


class _Mapped(Dataset):
    """The samples of a dataset, indexed by (position, index).

    An :class:`InputError` is returned, not raised, because torch would rebuild an exception of a
    worker from its message alone. :class:`_Loader` raises it in the main process.

    Args:
        unlabelled: which images have no labels, ``(n,)`` bool; None: none of them. Their samples say so.
    """

    def __init__(self, dataset, mapper, seed: int, unlabelled: np.ndarray | None = None):
        check_image_format(mapper)
        if reads_by_these_rules(mapper):
            _check_records(dataset)
        # As in Detectron2: one serialised copy for all workers, which no mapper can modify.
        self.dataset = (
            DatasetFromList(dataset, copy=False) if isinstance(dataset, list) else dataset
        )
        self.mapper, self.seed = mapper, seed
        self.unlabelled = np.zeros(len(dataset), bool) if unlabelled is None else unlabelled
        # Which images this process has checked; a mapper that reads images by its own rules is left alone.
        self._checked = bytearray(len(dataset)) if reads_by_these_rules(mapper) else None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, at: tuple[int, int]) -> dict | InputError:
        position, index = at
        unlabelled = self.unlabelled[index]
        with seeded_rng(self.seed, _SAMPLE + _KEYS * int(unlabelled), position):
            for other in range(len(self)):
                number = (index + other) % len(self)
                if self.unlabelled[number] != unlabelled:
                    continue
                record = self.dataset[number]
                try:
                    if self._checked is not None and not self._checked[number]:
                        check_record(record)
                        self._checked[number] = True
                    sample = self.mapper(record)
                    if unlabelled and sample is not None:  # a mapper may drop what it does not know
                        sample[UNLABELLED] = True
                except InputError as error:
                    return error
                except Exception as error:
                    blamed = _blame_image(record, error)
                    if blamed is None:
                        raise
                    return blamed
                if sample is not None:
                    return sample
        return InputError("the data set", "no image that the mapper accepts", "at least one")


def _check_records(dataset: Iterable[dict]) -> None:
    """Check that Detectron2's mapper can read all dataset dicts, whoever made them.

    Raises:
        InputError: naming the image, and the object.
    """
    for number, record in enumerate(dataset):
        name = record.get("file_name")
        if not isinstance(name, str | os.PathLike):
            raise InputError(f"image {number} of the data", f"file_name {name!r}", "a path")
        for position, one in enumerate(record.get("annotations") or ()):
            if fault := _object_fault(one):
                raise InputError(f"{name}: object {position}", *fault)


def _object_fault(one: dict) -> tuple[str, str] | None:
    """Return what is found instead of an object in Detectron2's format, and what is expected."""
    for key in ("bbox", "bbox_mode", "category_id"):
        if key not in one:
            return f"no {key}", "bbox, bbox_mode and category_id"
    box, mode, label = one["bbox"], one["bbox_mode"], one["category_id"]
    sides = {BoxMode.XYXY_ABS: 4, BoxMode.XYWH_ABS: 4, BoxMode.XYWHA_ABS: 5}.get(mode)
    if sides is None:
        return f"bbox_mode {mode}", "BoxMode.XYXY_ABS, XYWH_ABS or XYWHA_ABS"
    if (
        not isinstance(box, list | tuple)
        or len(box) != sides
        or not all(isinstance(value, Real) and math.isfinite(value) for value in box)
    ):
        return f"bbox {box!r}", f"a list of {sides} finite numbers"
    if not isinstance(label, Real) or label != int(label) or label < 0:
        return f"category_id {label!r}", "the index of a class, from 0"
    return None


def _blame_image(record: dict, error: Exception) -> InputError | None:
    """Return an error about the record's image, or None if the mapper failed for another reason."""
    name = record.get("file_name") if isinstance(record, dict) else None
    if name is None:
        return None
    if isinstance(error, detection_utils.SizeMismatchError):
        expected = f"{record.get('width')} x {record.get('height')} as in the annotations"
        try:
            height, width = read_image(name, "BGR").shape[:2]
            turned = check_image(name) != 1
        except Exception:
            return InputError(name, "another size", expected)
        after = " after its EXIF orientation" if turned else ""
        return InputError(name, f"{width} x {height} pixels{after}", expected)
    try:
        read_image(name, "BGR")
    except InputError as unreadable:
        return unreadable
    except Exception as unreadable:
        return InputError(name, f"cannot be decoded ({unreadable})", "a readable image")
    return None


@dataclass(frozen=True)
class _DataSets:
    """The data sets of a loader's images.

    Attributes:
        names: in the order of their first images; None: of images that do not say their data set.
        of_image: ``(n,)``, the index of each image's set.
        unlabelled: ``(n,)``, which images have no labels.
    """

    names: list[str | None]
    of_image: np.ndarray
    unlabelled: np.ndarray

    @classmethod
    def of(cls, dataset: Sequence[dict] | Dataset) -> _DataSets:
        if not isinstance(dataset, list):  # reading may be slow
            return cls([None], np.zeros(len(dataset), int), np.zeros(len(dataset), bool))
        records = [record if isinstance(record, dict) else {} for record in dataset]
        numbers: dict[str | None, int] = {}
        of_image = [
            numbers.setdefault(record.get(DATASET_NAME), len(numbers)) for record in records
        ]
        unlabelled = [bool(record.get(UNLABELLED)) for record in records]
        return cls(list(numbers), np.array(of_image), np.array(unlabelled))

    def check_ratio(self, ratio: Sequence[float]) -> np.ndarray:
        """Return the entry of each image's set, ``(n,)``; raise InputError for an invalid ratio."""
        culprit, names = "dataloader.train.ratio", ", ".join(map(str, self.names))
        if None in self.names:
            found = "images that do not say their data set"
            raise InputError(culprit, found, "dataset=L(get_detection_dataset_dicts)(names=[…])")
        if isinstance(ratio, str) or not isinstance(ratio, Sequence):
            raise InputError(culprit, repr(ratio), f"a list of numbers, one for each of {names}")
        if len(ratio) != len(self.names):
            raise InputError(culprit, f"{len(ratio)} numbers", f"one for each of {names}")
        for value in ratio:
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
                raise InputError(culprit, repr(value), "numbers above 0")
        return np.array(ratio, dtype=float)[self.of_image]


class _TrainingBatches(Sampler):
    """Infinite batches of (position, index) for this process, from batch ``start``.

    Processes take positions in turn, as in Detectron2's ``TrainingSampler``. The first batches are
    skipped by replaying the stream: this takes about a microsecond per sample, and a resumed run is
    exact even with incomplete groups.

    Args:
        entries: ``(n,)``, the entry of each image's data set in the ratio; None: there is no ratio.
    """

    def __init__(
        self,
        sets: _DataSets,
        entries: np.ndarray | None,
        batch_size: int,
        seed: int,
        start: int,
        groups: Sequence[int] | None,
    ):
        self.sets, self.groups = sets, groups
        self.batch_size, self.seed, self.start = batch_size, seed, start
        self.rank, self.world = comm.get_rank(), comm.get_world_size()
        self._images, self._repeats, shares = {}, {}, []
        for kind in (False, True):
            images = np.flatnonzero(sets.unlabelled == kind)
            self._images[kind], self._repeats[kind] = images, np.ones(len(images))
            shares.append(Fraction(len(images)))
            if entries is not None and len(images):
                used = np.unique(sets.of_image[images], return_index=True)[1]
                shares[-1] = sum(Fraction(entry) for entry in entries[images][used])
                self._repeats[kind] = _repeats(sets.of_image[images], entries[images])
        self._unlabelled_share = shares[True] / sum(shares)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return itertools.islice(self._all_batches(self.rank), self.start, None)

    def count(self, batches: int) -> np.ndarray:
        """Return how many images of each data set the first batches of all processes have."""
        total = np.zeros(len(self.sets.names), dtype=int)
        for rank in range(self.world):
            for batch in itertools.islice(self._all_batches(rank), batches):
                for _, index in batch:
                    total[self.sets.of_image[index]] += 1
        return total

    def _all_batches(self, rank: int) -> Iterator[list[tuple[int, int]]]:
        share = self._unlabelled_share
        if share in (0, 1):
            yield from self._batches_of(share == 1, rank)
            return
        kinds = [self._batches_of(kind, rank) for kind in (False, True)]
        for number in itertools.count():
            yield next(kinds[(number + 1) * share // 1 > number * share // 1])

    def _batches_of(self, kind: bool, rank: int) -> Iterator[list[tuple[int, int]]]:
        waiting = defaultdict(list)
        for position, index in self._stream(kind, rank):
            group = 0 if self.groups is None else self.groups[index]
            waiting[group].append((position, index))
            if len(waiting[group]) == self.batch_size:
                yield waiting.pop(group)

    def _stream(self, kind: bool, rank: int) -> Iterator[tuple[int, int]]:
        first = 0
        for epoch in itertools.count():
            order = self._order(kind, epoch)
            for i in range((rank - first) % self.world, len(order), self.world):
                yield first + i, int(order[i])
            first += len(order)

    def _order(self, kind: bool, epoch: int) -> np.ndarray:
        """Return the indices of an epoch's images in their order; ``kind`` says whether those without labels."""
        images, repeats = self._images[kind], self._repeats[kind]
        # RandomState, because later versions of NumPy may change Generator.permutation.
        rounding, shuffle = (
            np.random.RandomState(_seeds(self.seed, key + _KEYS * kind, epoch))
            for key in (_ROUNDING, _ORDER)
        )
        whole = np.floor(repeats).astype(int)
        drawn = images.repeat(whole + (rounding.random_sample(len(images)) < repeats - whole))
        return drawn[shuffle.permutation(len(drawn))]


def _repeats(of_image: np.ndarray, entries: np.ndarray) -> np.ndarray:
    """Return how often each image is drawn in an epoch, in expectation, see :func:`build_train_loader`: ``(n,)``.

    Args:
        of_image: index of each image's data set.
        entries: that set's entry in the ratio.
    """
    with np.errstate(all="ignore"):  # what overflows is refused
        repeats = entries / np.bincount(of_image)[of_image]
        repeats /= repeats.min()
    if not (draws := repeats.sum()) <= _MOST_DRAWS:
        found = f"numbers by which an epoch has {draws:.0e} images"
        raise InputError("dataloader.train.ratio", found, f"at most {_MOST_DRAWS:.0e}")
    return repeats


def _orientations(dataset) -> list[int]:
    wide = []
    for record in dataset:
        for key in {"width", "height"} - record.keys():
            found = f"an image without {key!r}"
            raise InputError("aspect_ratio_grouping", found, "width and height, or False")
        wide.append(int(record["width"] > record["height"]))
    return wide


def obey_parent_alone(worker: int) -> None:
    """Ignore Ctrl-C, and SIGTERM of other processes than the parent, in a loader's worker.

    A terminal, torchrun and schedulers also send them to workers, which the training process needs for its last step.
    Only the parent's SIGTERM ends the worker, as by Python at its exit. Where the sender of a signal is unknown, as on
    macOS, any SIGTERM does.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


class _Loader(DataLoader):
    """A DataLoader that raises the errors its workers return."""

    def __iter__(self):
        for batch in super().__iter__():
            for sample in batch:
                if isinstance(sample, InputError):
                    raise sample
            yield batch
