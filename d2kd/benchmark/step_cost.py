"""Cost of a distilled step relative to a plain one over a whole run, for runs of equal time."""

from __future__ import annotations

import contextlib
import copy
import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from fvcore.common.param_scheduler import ParamScheduler
from omegaconf import DictConfig
from torch import nn

from ..engine import Trainer
from ..engine.train_step import NonFiniteError
from ..losses.base import get_weight
from ..utils.errors import InputError
from ..utils.random_state import preserved_random_state

MIN_PAIRS = 12  # pairs
MIN_PAIRS_PER_POINT = 3
GRID = 1000  # maximum number of iterations at which the schedules of losses are evaluated
SEED = 0


@dataclass(frozen=True)
class StepCost:
    """The cost of a distilled step relative to a plain one.

    Attributes:
        ratio: cost of a distilled step divided by that of a plain one, averaged over a run.
        low, high: its 95 % bootstrap interval.
        pairs: number of measured pairs of steps.
        clock: "cpu seconds" or "cuda events".
    """

    ratio: float
    low: float
    high: float
    pairs: int
    clock: str


def step_cost(
    distilled: DictConfig,
    plain: DictConfig,
    pairs: int = 24,
    progress: Callable[[int, int], None] | None = None,
) -> StepCost:
    """Time steps of two recipes alternately, with equal batches and random draws. Each is first in every second pair.

    The steps are complete training steps, including data loading, with a learning rate of 0. Nothing is written. The
    time of loader workers counts only while a step waits for them. On a CPU the time is that of all threads of this
    process, which depends less on other processes than wall-clock time does.

    The cost of a distilled step depends on which losses are on. So pairs are measured at the beginning, in the middle
    and at the end of the distilled run, and at one more point for each other set of losses that the schedules switch
    on. The ratio at a point is the median over its pairs, which is robust to single slow steps. Ratios are interpolated
    between points with the same losses on; outside of them the nearest one is used. The ratio of the run is the mean
    over its iterations, so a loss that is off in the last 40 % counts for 60 %. The bootstrap resamples the pairs of
    each point.

    Args:
        distilled, plain: complete recipes, with initial weights and teacher weights. The seed of the distilled one is
            used for both.
        pairs: total number of pairs, distributed by the fraction of the run that each point stands for, with at least 3
            per point, so there may be more. One more pair per point is for warm-up.
        progress: progress callback, called with (pairs done, pairs) before the first pair and after each one, including
            those for warm-up.

    Raises:
        InputError: a recipe cannot be trained, or there are fewer than 12 pairs.
    """
    if pairs < MIN_PAIRS:
        raise InputError("pairs", pairs, f"at least {MIN_PAIRS}")
    recipes = copy.deepcopy(distilled), copy.deepcopy(plain)
    for config in recipes:
        config.train.seed = max(distilled.train.get("seed") or 0, 0)
    with _restored_state():
        trainers = [Trainer(config) for config in recipes]
        for trainer in trainers:
            trainer.resume_or_load(resume=False)
            trainer.model.train()
            for group in trainer._trainer.optimizer.param_groups:
                group["lr"] = 0.0
        clock, timed = _clock(trainers[0].device)
        weights = _points(trainers[0].model, trainers[0].max_iter)
        counts = {i: 1 + max(MIN_PAIRS_PER_POINT, round(pairs * w)) for i, w in weights.items()}
        counts[max(weights, key=weights.get)] += max(0, pairs + len(counts) - sum(counts.values()))
        ratios, done, total = [], 0, sum(counts.values())
        for iteration, count in counts.items():
            found = []
            for _ in range(count):
                if progress is not None:
                    progress(done, total)
                first = done % 2
                seconds = [0.0, 0.0]
                for which in (first, 1 - first):
                    seconds[which] = timed(_step, trainers[which], iteration, done)
                found.append(seconds[0] / seconds[1])
                done += 1
            ratios.append(found[1:])
        if progress is not None:
            progress(done, total)
        del trainer, trainers
        gc.collect()  # a trainer and its hooks are in a reference cycle
        torch.cuda.empty_cache()
    return StepCost(*_estimate(list(weights.values()), ratios), total - len(weights), clock)


def _step(trainer: Trainer, iteration: int, number: int) -> None:
    seed_all_rng(SEED + number)
    with EventStorage(start_iter=iteration):
        trainer._trainer.iter = iteration  # newer versions write it with the metrics
        try:
            trainer._trainer.run_step()
            trainer._trainer.read_metrics()
        except NonFiniteError as error:
            raise InputError(error.culprit, error.value, "a finite number") from None


def _clock(device: torch.device) -> tuple[str, Callable[..., float]]:
    """Return the name of the clock, and a function that measures the time of a call."""

    def on_cpu(call: Callable[..., None], *args: object) -> float:
        start = time.process_time()
        call(*args)
        return time.process_time() - start

    def on_cuda(call: Callable[..., None], *args: object) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call(*args)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    return ("cuda events", on_cuda) if device.type == "cuda" else ("cpu seconds", on_cpu)


def _points(model: nn.Module, max_iter: int) -> dict[int, float]:
    """Return the iterations at which to measure, and the fraction of the run that each stands for."""
    losses, length = getattr(model, "losses", nn.Module()), getattr(model, "max_iter", max_iter)
    grid = np.unique(np.linspace(0, max_iter - 1, min(max_iter, GRID)).round().astype(int))
    by_state = defaultdict(list)
    for iteration in grid.tolist():
        by_state[_switched_on(losses, iteration / length)].append(iteration)
    states = {i: state for state, iterations in by_state.items() for i in iterations}
    points = {0, max_iter // 2, max_iter - 1}
    points = {i: _switched_on(losses, i / length) for i in points}
    for state, iterations in by_state.items():
        if state not in points.values():
            points[iterations[len(iterations) // 2]] = state
    weights = dict.fromkeys(sorted(points), 0.0)
    for state, iterations in by_state.items():
        same_state = [i for i in weights if points[i] == state]
        for i, row in zip(same_state, np.eye(len(same_state))):
            weights[i] = float(np.interp(iterations, same_state, row).sum()) / len(states)
    return weights


def _switched_on(losses: nn.Module, progress: float) -> frozenset:
    """Return which schedules of the active losses are not 0, and which of their changes are past."""
    found = set()
    for name, loss in getattr(losses, "by_name", nn.ModuleDict()).items():
        if get_weight(loss.weight, progress) == 0:
            continue
        found |= {(name, change) for change in loss.milestones if progress >= change}
        for part, module in loss.named_modules():
            found |= {
                (name, part, key)
                for key, value in vars(module).items()
                if isinstance(value, ParamScheduler) and get_weight(value, progress) != 0
            }
    return frozenset(found)


def _estimate(
    weights: Sequence[float], ratios: Sequence[Sequence[float]]
) -> tuple[float, float, float]:
    """Return the weighted mean of the medians of all points, and its 95 % bootstrap interval."""
    ratio = float(np.dot(weights, [np.median(values) for values in ratios]))
    random = np.random.default_rng(SEED)
    drawn = np.dot(weights, [bootstrap_medians(values, random) for values in ratios])
    low, high = np.percentile(drawn, [2.5, 97.5])
    return ratio, min(float(low), ratio), max(float(high), ratio)


def bootstrap_medians(
    values: Sequence[float], random: np.random.Generator, draws: int = 10_000
) -> np.ndarray:
    """Return the medians of ``draws`` bootstrap samples of the values."""
    values = np.asarray(values, dtype=float)
    return np.median(random.choice(values, (draws, len(values))), axis=1)


@contextlib.contextmanager
def _restored_state() -> Iterator[None]:
    """On exit restore the random states, the registered data sets and ``cudnn.benchmark``."""
    registered, known = set(DatasetCatalog.list()), set(MetadataCatalog.list())
    benchmark = torch.backends.cudnn.benchmark
    try:
        with preserved_random_state():
            yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
        for name in set(DatasetCatalog.list()) - registered:
            DatasetCatalog.remove(name)
        for name in set(MetadataCatalog.list()) - known:
            MetadataCatalog.remove(name)
