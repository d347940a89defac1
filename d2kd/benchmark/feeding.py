"""Whether data keep up: how fast the recipe's own loader is, and how long a step waits for it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from detectron2.config import instantiate
from detectron2.utils.events import get_event_storage

from ..data import use_seeded_loaders
from .bench import DISTILLED, SEED, WARM_UPS, Bench


def feeding(
    bench: Bench, batch_size: int, steps: int, report: Callable[[int, int], None]
) -> dict[str, Any]:
    """Read the recipe's training data, first alone, then as the distilled step asks for them.

    Args:
        batch_size: images in a batch, instead of the recipe's.
        steps: batches to time, after three that are not counted, each time.
        report: told (batches, batches in all) before each.

    Returns:
        ``workers`` of the loader; ``loader_images_per_second``, where nothing else is done; and of steps that it
        feeds, ``median_seconds``, ``waiting_seconds`` (the median time of a step until its batch is there) and
        ``images_per_second``.

    Raises:
        InputError: the data cannot be read.
    """
    total = 2 * (WARM_UPS + steps)
    done = itertools.count()
    loader = _loader(bench, batch_size)
    alone = []
    batches = iter(loader)
    for _ in range(WARM_UPS + steps):
        report(next(done), total)
        alone.append(_seconds(bench, next, batches))
    del batches  # and its workers
    trainer = bench.fed(DISTILLED, _loader(bench, batch_size))
    taken, waited = [], []
    with bench.half_way():
        for _ in range(WARM_UPS + steps):
            report(next(done), total)
            taken.append(_seconds(bench, trainer.run_step))
            waited.append(get_event_storage().latest()["data_time"][0])
    seconds = float(np.median(taken[WARM_UPS:]))
    return {
        "workers": getattr(loader, "num_workers", 0),
        "loader_images_per_second": batch_size / float(np.mean(alone[WARM_UPS:])),
        "median_seconds": seconds,
        "waiting_seconds": float(np.median(waited[WARM_UPS:])),
        "images_per_second": batch_size / seconds,
    }


def check_data(bench: Bench) -> None:
    """Read one image of the recipe's training data.

    Raises:
        InputError: that cannot be done.
    """
    next(iter(_loader(bench, 1)))


def _loader(bench: Bench, batch_size: int) -> Iterable[list[dict]]:
    dataloader = copy.deepcopy(bench.dataloader)
    dataloader.train.total_batch_size = batch_size
    use_seeded_loaders(dataloader, seed=SEED)
    return instantiate(dataloader.train)


def _seconds(bench: Bench, function: Callable[..., object], *args: object) -> float:
    start = bench.clock()
    function(*args)
    return bench.clock() - start
