"""What a distilled step costs beside a plain one over a whole run, for runs of equal time."""

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
from ..engine.step import NotFinite
from ..losses.base import value_of
from ..utils.errors import InputError
from ..utils.random_state import preserved_random_state

LEAST = 12  # pairs
LEAST_AT_A_POINT = 3
GRID = 1000  # iterations at which the losses' schedules are looked up, at most
SEED = 0


@dataclass(frozen=True)
class StepCost:
    """How many plain steps cost as much as a distilled one.

    Attributes:
        ratio: the cost of a distilled step by that of a plain one, over a whole run.
        low, high: its 95 % bootstrap interval.
        pairs: how many pairs of steps were measured in all.
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
    report: Callable[[int, int], None] | None = None,
) -> StepCost:
    """Measure steps of two recipes in alternation, each first in turn, on equal batches and random draws.

    The steps are those of a run, reading the batch included; only the learning rate is 0. Nothing is written. Loader
    workers count as far as a step waits for them. CPU seconds are those of all threads of this process, which other
    processes disturb less than the time on the wall.

    What a distilled step costs depends on which losses are on. So pairs are measured at the beginning, half-way and
    at the end of the distilled run, and once more for each other set of losses that its schedules switch on. At each of
    these points the ratio is the median of the pairs', which neither a slow step nor the choice of a convolution's
    algorithm moves. The iterations between two points with the same losses on are interpolated, those before and after
    are given the nearest one's. The ratio of the run is the mean over its iterations, so a loss that is off
    in the last 40 % counts for 60 %. For the interval the pairs of each point are drawn anew.

    Args:
        distilled, plain: whole recipes, with the weights that they start from and the teacher's. The plain one gets
            the seed of the other.
        pairs: in all, or a few more: a point has as many as its share of the run, and at least 3. A first pair at each
            point is not counted.
        report: called with (pairs done, pairs in all) before the first pair and after each, those not counted
            included.

    Raises:
        InputError: a recipe cannot be trained, or there are fewer than 12 pairs.
    """
    if pairs < LEAST:
        raise InputError("pairs", pairs, f"at least {LEAST}")
    recipes = copy.deepcopy(distilled), copy.deepcopy(plain)
    for config in recipes:
        config.train.seed = max(distilled.train.get("seed") or 0, 0)
    with _as_before():
        trainers = [Trainer(config) for config in recipes]
        for trainer in trainers:
            trainer.resume_or_load(resume=False)
            trainer.model.train()
            for group in trainer._trainer.optimizer.param_groups:
                group["lr"] = 0.0
        clock, timed = _clock(trainers[0].device)
        weights = _points(trainers[0].model, trainers[0].max_iter)
        counts = {i: 1 + max(LEAST_AT_A_POINT, round(pairs * w)) for i, w in weights.items()}
        counts[max(weights, key=weights.get)] += max(0, pairs + len(counts) - sum(counts.values()))
        ratios, done, total = [], 0, sum(counts.values())
        for iteration, count in counts.items():
            found = []
            for _ in range(count):
                if report is not None:
                    report(done, total)
                first = done % 2
                seconds = [0.0, 0.0]
                for which in (first, 1 - first):
                    seconds[which] = timed(_step, trainers[which], iteration, done)
                found.append(seconds[0] / seconds[1])
                done += 1
            ratios.append(found[1:])
        if report is not None:
            report(done, total)
        del trainer, trainers
        gc.collect()  # a trainer and its hooks hold each other
        torch.cuda.empty_cache()
    return StepCost(*_estimate(list(weights.values()), ratios), total - len(weights), clock)


def _step(trainer: Trainer, iteration: int, number: int) -> None:
    seed_all_rng(SEED + number)
    with EventStorage(start_iter=iteration):
        trainer._trainer.iter = iteration  # which newer versions write beside metrics
        try:
            trainer._trainer.run_step()
        except NotFinite as error:
            raise InputError(error.culprit, error.value, "a finite number") from None


def _clock(device: torch.device) -> tuple[str, Callable[..., float]]:
    """What the clock is called, and a function that measures a call."""

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
    """The iterations at which to measure, and for what share of the run each stands."""
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
        alike = [i for i in weights if points[i] == state]
        for i, row in zip(alike, np.eye(len(alike))):
            weights[i] = float(np.interp(iterations, alike, row).sum()) / len(states)
    return weights


def _switched_on(losses: nn.Module, progress: float) -> frozenset:
    """Which schedules of the losses that are on are not 0, and which changes of theirs are past."""
    found = set()
    for name, loss in getattr(losses, "by_name", nn.ModuleDict()).items():
        if value_of(loss.weight, progress) == 0:
            continue
        found |= {(name, change) for change in loss.changes if progress >= change}
        for part, module in loss.named_modules():
            found |= {
                (name, part, key)
                for key, value in vars(module).items()
                if isinstance(value, ParamScheduler) and value_of(value, progress) != 0
            }
    return frozenset(found)


def _estimate(
    weights: Sequence[float], ratios: Sequence[Sequence[float]]
) -> tuple[float, float, float]:
    """The weighted mean of the points' medians, and its interval."""
    ratio = float(np.dot(weights, [np.median(values) for values in ratios]))
    random = np.random.default_rng(SEED)
    drawn = np.dot(weights, [bootstrap_medians(values, random) for values in ratios])
    low, high = np.percentile(drawn, [2.5, 97.5])
    return ratio, min(float(low), ratio), max(float(high), ratio)


def bootstrap_medians(
    values: Sequence[float], random: np.random.Generator, draws: int = 10_000
) -> np.ndarray:
    """The medians of ``draws`` samples of these values, each as many, with replacement."""
    values = np.asarray(values, dtype=float)
    return np.median(random.choice(values, (draws, len(values))), axis=1)


@contextlib.contextmanager
def _as_before() -> Iterator[None]:
    """Inside, recipes may be built and run; after, generators, registered data and cuDNN's choice are as before."""
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
