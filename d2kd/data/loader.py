"""Data loaders in which every random draw comes from (seed, sample position).

Two runs with one seed then see the same images, flipped and cropped alike, whatever the number of
workers, whatever was built or drawn before, and also after a resume: the pair differs in what is
compared and in nothing else. Detectron2's own loaders draw from worker-global state and deal images
to workers, so they differ in all of these.

A *position* counts samples from the start of training, over all processes; epoch e is positions e·n
to (e+1)·n.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from detectron2.data import (
    DatasetFromList,
    build_detection_test_loader,
    build_detection_train_loader,
    detection_utils,
)
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import InferenceSampler
from detectron2.utils import comm
from detectron2.utils.registry import locate
from omegaconf import OmegaConf
from torch.utils.data import DataLoader, Dataset, Sampler

from d2kd.utils.errors import InputError

_ORDER, _SAMPLE = range(2)  # what a random number is for


def build_train_loader(
    dataset: Sequence[dict] | Dataset,
    *,
    mapper: Callable[[dict], dict | None],
    total_batch_size: int,
    seed: int | None = 0,
    start: int = 0,
    num_workers: int = 0,
    aspect_ratio_grouping: bool = True,
) -> DataLoader:
    """An endless loader, in place of Detectron2's `build_detection_train_loader`.

    Args:
        dataset: dataset dicts in Detectron2's format, or a map-style dataset of them.
        mapper: makes a sample of a dataset dict; None says "not this one", and the next takes its
            place.
        total_batch_size: images per iteration over all processes.
        seed: decides everything random; None or negative draws one, as in Detectron2.
        start: iterations already done; the loader goes on exactly where an uninterrupted one would
            be.
        aspect_ratio_grouping: batch wide images with wide, tall with tall.

    Returns:
        A loader of lists of samples, ``total_batch_size / world size`` each.
    """
    world = comm.get_world_size()
    if total_batch_size < 1 or total_batch_size % world:
        expected = f"a positive multiple of the {world} process(es)"
        raise InputError("total_batch_size", total_batch_size, expected)
    if len(dataset) == 0:
        raise InputError("the training set", "no image", "at least one")
    if seed is None or seed < 0:
        seed = comm.shared_random_seed()
    groups = _orientations(dataset) if aspect_ratio_grouping else None
    batches = _TrainingBatches(len(dataset), total_batch_size // world, seed, start, groups)
    return _Loader(
        _Mapped(dataset, mapper, seed),
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=trivial_batch_collator,
        generator=torch.Generator(),  # or the first iteration would draw from the global one
    )


def build_test_loader(
    dataset: Sequence[dict] | Dataset,
    *,
    mapper: Callable[[dict], dict],
    sampler: Iterable[int] | None = None,
    batch_size: int = 1,
    num_workers: int = 0,
) -> DataLoader:
    """Every image once, dealt to the processes as by Detectron2's own test loader.

    Args:
        sampler: the indices that this process gets, instead of its share.
        batch_size: images of a batch, at most. Several suit small detectors and images of one size; images of
            different sizes are padded to the largest of their batch, which may change what is detected in them.
    """
    if len(dataset) == 0:
        raise InputError("the test set", "no image", "at least one")
    if batch_size < 1:
        raise InputError("batch_size", batch_size, "at least 1")
    indices = InferenceSampler(len(dataset)) if sampler is None else sampler
    positions = [(index, index) for index in indices]
    return _Loader(
        _Mapped(dataset, mapper, seed=0),
        batch_sampler=[
            positions[first : first + batch_size] for first in range(0, len(positions), batch_size)
        ],
        num_workers=num_workers,
        collate_fn=trivial_batch_collator,
        generator=torch.Generator(),
    )


def use_seeded_loaders(dataloader, *, seed: int | None, start: int | None = None) -> None:
    """Make a recipe's `dataloader` node build our loaders where it says Detectron2's, in place.

    Every zoo recipe becomes a seeded one this way. A node with an option that ours do not have (a
    sampler or collate function of its own) is left as it is, with a warning. `seed` is for training
    nodes that name none, `start` for all of them.
    """
    tests = dataloader.get("test") or []
    for node in tests if OmegaConf.is_list(tests) else [tests]:
        if node:
            _replace(node, build_detection_test_loader, build_test_loader)
    train = dataloader.get("train")
    if train:
        _replace(train, build_detection_train_loader, build_train_loader)
        if _target(train) is build_train_loader:
            if start is not None:
                train["start"] = start
            # A reference to a `train.seed` that the recipe lacks names none, either.
            if OmegaConf.select(train, "seed", throw_on_resolution_failure=False) is None:
                train["seed"] = seed


def _target(node) -> object:
    target = node.get("_target_")
    return locate(target) if isinstance(target, str) else target


def _replace(node, theirs: Callable, ours: Callable) -> None:
    if _target(node) is not theirs:
        return
    unknown = sorted(node.keys() - inspect.signature(ours).parameters.keys() - {"_target_"})
    used = [name for name in unknown if node[name] is not None]
    if used:
        logging.getLogger(__name__).warning(
            f"Detectron2's {theirs.__name__} stays because of {', '.join(used)}: "
            "its random draws depend on the number of workers"
        )
        return
    for name in unknown:
        del node[name]
    node["_target_"] = f"{ours.__module__}.{ours.__qualname__}"


def _words(*key: int) -> np.ndarray:
    """Well mixed seed material of a key; the same on every machine."""
    return np.random.SeedSequence(key).generate_state(8)


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """The global generators of NumPy, Python and torch (CPU) start from `key`; after, as before."""
    former = np.random.get_state(), random.getstate(), torch.default_generator.get_state()
    words = _words(*key)
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
    """The samples of a dataset, addressed by (position, index).

    An :class:`InputError` is returned, not raised: between processes torch would rebuild it from
    one message and lose what it says. :class:`_Loader` raises it in the main process.
    """

    def __init__(self, dataset, mapper, seed: int):
        # As Detectron2 does: one serialised copy for all workers, and no mapper can change it.
        self.dataset = (
            DatasetFromList(dataset, copy=False) if isinstance(dataset, list) else dataset
        )
        self.mapper, self.seed = mapper, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, at: tuple[int, int]) -> dict | InputError:
        position, index = at
        with seeded(self.seed, _SAMPLE, position):
            for other in range(len(self)):
                record = self.dataset[(index + other) % len(self)]
                try:
                    sample = self.mapper(record)
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


def _blame_image(record: dict, error: Exception) -> InputError | None:
    """What is wrong with the record's image, or None if the mapper failed for another reason."""
    name = record.get("file_name") if isinstance(record, dict) else None
    if name is None:
        return None
    if isinstance(error, detection_utils.SizeMismatchError):
        expected = f"{record.get('width')} x {record.get('height')} as in the annotations"
        try:
            height, width = detection_utils.read_image(name).shape[:2]
        except Exception:
            return InputError(name, "another size", expected)
        return InputError(name, f"{width} x {height} pixels", expected)
    try:
        detection_utils.read_image(name)
    except Exception as unreadable:
        return InputError(name, f"cannot be decoded ({unreadable})", "a readable image")
    return None


class _TrainingBatches(Sampler):
    """This process's batches of (position, index), without end, after the first `start`.

    Positions are dealt to the processes in turn, as by Detectron2's `TrainingSampler`. Skipping
    replays the stream, which costs about a microsecond a sample and keeps a resumed run exact even
    with half-filled groups.
    """

    def __init__(
        self, size: int, batch_size: int, seed: int, start: int, groups: Sequence[int] | None
    ):
        self.size, self.batch_size, self.seed, self.start = size, batch_size, seed, start
        self.groups = groups
        self.rank, self.world = comm.get_rank(), comm.get_world_size()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return itertools.islice(self._from_the_beginning(), self.start, None)

    def _from_the_beginning(self) -> Iterator[list[tuple[int, int]]]:
        waiting = defaultdict(list)
        for position, index in self._stream():
            group = 0 if self.groups is None else self.groups[index]
            waiting[group].append((position, index))
            if len(waiting[group]) == self.batch_size:
                yield waiting.pop(group)

    def _stream(self) -> Iterator[tuple[int, int]]:
        for epoch in itertools.count():
            first = epoch * self.size
            # RandomState, because its permutation is frozen and Generator's is not.
            order = np.random.RandomState(_words(self.seed, _ORDER, epoch)).permutation(self.size)
            for i in range((self.rank - first) % self.world, self.size, self.world):
                yield first + i, int(order[i])


def _orientations(dataset) -> list[int]:
    wide = []
    for record in dataset:
        for key in {"width", "height"} - record.keys():
            found = f"an image without {key!r}"
            raise InputError("aspect_ratio_grouping", found, "width and height, or False")
        wide.append(int(record["width"] > record["height"]))
    return wide


class _Loader(DataLoader):
    """A DataLoader that raises the errors its workers met."""

    def __iter__(self):
        for batch in super().__iter__():
            for sample in batch:
                if isinstance(sample, InputError):
                    raise sample
            yield batch
