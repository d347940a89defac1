"""Speed of a recipe's data loader, and the time that a training step waits for it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from detectron2.utils.events import get_event_storage
from omegaconf import OmegaConf

from ..config import build_part
from ..data import use_seeded_loaders
from ..utils.errors import InputError
from .bench import DISTILLED, SEED, WARM_UPS, Bench


def measure_data_loading(
    bench: Bench, batch_size: int, steps: int, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Load the recipe's training data, first without training, then in distilled steps.

    Args:
        bench: the detectors.
        batch_size: number of images per batch, instead of the recipe's.
        steps: number of batches to time in each case, after three for warm-up.
        progress: progress callback, called with (batches done, batches) before each batch.

    Returns:
        ``workers``, the number of loader workers; ``loader_images_per_second`` without training; and of training
        steps ``median_seconds``, ``waiting_seconds`` (median time that a step waits for its batch) and
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
        progress(next(done), total)
        alone.append(_seconds(bench, next, batches))
    del batches  # ends the workers
    trainer = bench.with_loader(DISTILLED, _loader(bench, batch_size))
    seconds_per_step, waiting = [], []
    with bench.at_half_progress():
        for _ in range(WARM_UPS + steps):
            progress(next(done), total)
            seconds_per_step.append(_seconds(bench, trainer.run_step))
            trainer.read_metrics()
            waiting.append(get_event_storage().latest()["data_time"][0])
    median = float(np.median(seconds_per_step[WARM_UPS:]))
    return {
        "workers": getattr(loader, "num_workers", 0),
        "loader_images_per_second": batch_size / float(np.mean(alone[WARM_UPS:])),
        "median_seconds": median,
        "waiting_seconds": float(np.median(waiting[WARM_UPS:])),
        "images_per_second": batch_size / median,
    }


def check_loadable(bench: Bench) -> None:
    """Load one image of the recipe's training data.

    Raises:
        InputError: the data cannot be read.
    """
    next(iter(_loader(bench, 1)))


def _loader(bench: Bench, batch_size: int) -> Iterable[list[dict]]:
    dataloader = copy.deepcopy(bench.dataloader)
    if not OmegaConf.is_dict(dataloader.train) or "total_batch_size" not in dataloader.train:
        found = "no total_batch_size"
        raise InputError("dataloader.train", found, "a node with one, to measure several")
    dataloader.train.total_batch_size = batch_size
    use_seeded_loaders(dataloader, seed=SEED)
    return build_part("dataloader.train", dataloader.train)


def _seconds(bench: Bench, function: Callable[..., object], *args: object) -> float:
    start = bench.clock()
    function(*args)
    return bench.clock() - start
