"""Training of the runs of a study, sequentially or in parallel; an interrupted study is resumed."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch
from detectron2.data import DatasetCatalog
from omegaconf import DictConfig

from ..data import check_dataset
from ..utils.console import ProgressBar, ProgressCallback, suppress_output
from ..utils.errors import InputError
from ..utils.io import read_rows, write_json
from .plan import Run, Study, prepare_recipe, timed_recipes
from .results import format_step_cost, write_results
from .run import (
    TrainingResult,
    add_labels,
    finished_row,
    torch_threads,
    train,
    train_in_subprocess,
    train_run,
)

STEP_COST = "step_cost.json"
"""File in a study's folder with the costs of distilled steps relative to plain ones."""


def run_study(
    study: Study,
    runs: Sequence[Run],
    output: Path,
    trainer: SequentialRunner | None = None,
    console: TextIO | None = None,
    others: Sequence[Run] = (),
) -> tuple[list[dict[str, Any]], dict[str, InputError]]:
    """Train the unfinished runs of a study. The results of all runs are written after each run.

    If a run fails, for example because of a non-finite loss, the runs that need it are skipped; others continue.

    Args:
        study: the study.
        runs: its runs, see :meth:`Study.plan`.
        output: the study's folder; each run has a folder in it.
        trainer: trains the runs; default: :class:`SequentialRunner`.
        console: stream of the progress output; default: stdout.
        others: further runs that are not trained, but whose rows are included if they are finished. May contain
            those in ``runs``.

    Returns:
        the rows of ``results.json``, sorted by method, and run name -> error of the failed runs.

    Raises:
        InputError: the test split cannot be read. It is loaded first, and generated if it is a generated data set.
    """
    for test in dict.fromkeys([study.test, *(run.test for run in runs)]):
        for name in check_dataset(test):
            DatasetCatalog.get(name)  # loading an increment checks that it has objects
    trainer, console = trainer or SequentialRunner(), console or sys.stdout
    finished: dict[str, dict[str, Any]] = {}
    failed: dict[str, InputError] = {}
    width = max(len(run.name) for run in runs)
    requested = {run.name for run in runs}
    # Finished runs first, so that the table of an interrupted study has their rows.
    waiting = [*(run for run in others if run.name not in requested), *trainer.ordered(runs)]
    busy: dict[str, tuple[Run, ProgressBar, Iterator[None]]] = {}

    def rows() -> list[dict[str, Any]]:
        return sorted(finished.values(), key=lambda row: list(study.runs).index(row["method"]))

    def line_of(run: Run) -> ProgressBar:
        return ProgressBar(f"  {run.name:<{width}}", console, live=trainer.jobs == 1)

    def close(run: Run, line: ProgressBar, row: dict[str, Any], before: str = "") -> None:
        ap = "undefined" if row["AP"] is None else f"{row['AP']:.1f}"
        line.close(f"{before}AP {ap}, trained for {row['seconds']:.0f} s")
        finished[run.name] = row
        write_results(output, study, rows())

    def fail(run: Run, line: ProgressBar, error: InputError) -> None:
        failed[run.name] = error
        line.close(f"failed: {error}")

    def step_cost(run: Run) -> dict[str, Any] | None:
        """Return the step cost of an equal-time run. It is measured if it is unknown and no run is being trained."""
        *recipes, key = timed_recipes(run, finished, output / run.name)
        costs = read_rows(output / STEP_COST)
        cost = next((row for row in costs if row.get("recipes_sha256") == key), None)
        if cost is None and run.name in requested and not busy:
            line = ProgressBar(f"  {run.method:<{width}}  cost of a step", console)
            found = trainer.step_cost(*recipes, line)
            line.close(format_step_cost(found, "a plain step"))
            cost = {"method": run.method, "recipes_sha256": key, **found}
            write_json(output / STEP_COST, {"schema": 1, "rows": [*costs, cost]})
        return cost and {name: cost[name] for name in COST_FIELDS}

    def begin(run: Run) -> bool:
        """Start, skip or finish a run; return False if it must wait until no other run is being trained."""
        folder, cost = output / run.name, None
        missing = [need for need in run.dependencies if need not in finished]
        if missing:
            if run.name in requested:
                line_of(run).close(f"skipped, since it needs {missing[0]}")
            return True
        if run.match_time_of is not None:
            try:
                cost = step_cost(run)
            except InputError as error:
                fail(run, line_of(run), error)
                return True
            if cost is None:
                return run.name not in requested
        config, key = prepare_recipe(run, finished, folder, cost and cost["ratio"])
        row = finished_row(folder, key, run.test)
        if row is not None:
            close(run, line_of(run), row, "finished before: ")
        elif run.name in requested:
            labelled = 0
            if run.labels is not None:
                by = finished[run.labels.detector]
                line = ProgressBar(f"  {run.name:<{width}}  labels of {by['name']}", console)
                try:
                    config, labelled, found = add_labels(config, run.labels, by, line)
                except InputError as error:
                    fail(run, line, error)
                    return True
                line.close(found)
            line = line_of(run)
            training = train_run(folder, run, config, key, trainer.train, line, cost, labelled)
            busy[run.name] = run, line, training
        return True

    try:
        while waiting or busy:
            unknown = {run.name for run in waiting} | busy.keys()
            ready = [run for run in waiting if unknown.isdisjoint(run.dependencies)]
            for run in ready if not busy else ():  # early, since it needs an idle machine
                if run.match_time_of is not None and finished.keys() >= set(run.dependencies):
                    with contextlib.suppress(InputError):  # raised again when the run starts
                        step_cost(run)
            for run in ready:
                if len(busy) == trainer.jobs or not begin(run):
                    break
                waiting.remove(run)
                if run.name in finished:
                    break  # other runs may be ready now
            for run, line, training in list(busy.values()):
                try:
                    next(training)
                    continue
                except StopIteration as end:
                    close(run, line, end.value)
                except InputError as error:
                    fail(run, line, error)
                del busy[run.name]
            if busy:
                time.sleep(0.2)
    finally:
        for *_, training in busy.values():
            training.close()
    return rows(), failed


COST_FIELDS = ("ratio", "low", "high", "pairs", "clock")
"""Fields of :class:`d2kd.benchmark.step_cost.StepCost` in a row."""


def measure_step_cost(
    distilled: DictConfig, plain: DictConfig, progress: ProgressCallback
) -> dict[str, Any]:
    """Call :func:`d2kd.benchmark.step_cost.step_cost` and return its result as a dict."""
    from ..benchmark.step_cost import step_cost  # imported here, since only equal-time runs need it

    with suppress_output():
        return asdict(step_cost(distilled, plain, progress=progress))


class SequentialRunner:
    """Trains the runs one after another in this process.

    Args:
        train: trains a recipe.
        step_cost: measures the cost of a distilled step relative to a plain one.
    """

    jobs = 1

    def __init__(
        self,
        train: Callable[[DictConfig, str, ProgressCallback], TrainingResult] = train,
        step_cost: Callable[[DictConfig, DictConfig, ProgressCallback], dict] = measure_step_cost,
    ):
        self._train, self._step_cost = train, step_cost

    def ordered(self, runs: Sequence[Run]) -> list[Run]:
        """Return the runs in the order in which they are started."""
        return list(runs)

    def step_cost(
        self, distilled: DictConfig, plain: DictConfig, progress: ProgressCallback
    ) -> dict[str, Any]:
        """Measure the cost of a distilled step relative to a plain one, while no run is being trained."""
        return self._step_cost(distilled, plain, progress)

    def train(self, run: Run, config: DictConfig, progress: ProgressCallback) -> Iterator[None]:
        """Train a run; see :func:`.train_run`."""
        yield from ()
        return self._train(config, run.test, progress)


class ParallelRunner(SequentialRunner):
    """Trains the runs in parallel with the training command, each with an equal number of threads.

    Runs that all seeds share are started first, since the others need them. Each run has its own GPU if there are
    enough.

    Args:
        jobs: maximum number of runs in parallel.
    """

    def __init__(self, jobs: int = 1):
        super().__init__()
        self.jobs = jobs
        self._threads_per_run = max(1, torch.get_num_threads() // jobs)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        count = torch.cuda.device_count()
        self._gpus = visible.split(",")[:count] if visible else [str(k) for k in range(count)]
        self._taken: list[str | None] = []  # one entry per run that uses the GPU

    def ordered(self, runs: Sequence[Run]) -> list[Run]:
        """Return the runs in the order in which they are started: with several jobs, runs that seeds share come first."""
        return (
            sorted(runs, key=lambda run: not run.shared_across_seeds)
            if self.jobs > 1
            else list(runs)
        )

    def step_cost(
        self, distilled: DictConfig, plain: DictConfig, progress: ProgressCallback
    ) -> dict[str, Any]:
        """Like :meth:`SequentialRunner.step_cost`, with the number of threads of a run."""
        with torch_threads(self._threads_per_run):
            return super().step_cost(distilled, plain, progress)

    def train(self, run: Run, config: DictConfig, progress: ProgressCallback) -> Iterator[None]:
        """Like :meth:`SequentialRunner.train`, in a subprocess."""
        threads = self._threads_per_run
        gpu = min(self._gpus, key=self._taken.count, default=None)
        self._taken.append(gpu)
        try:
            return (yield from train_in_subprocess(config, run.test, progress, threads, gpu))
        finally:
            self._taken.remove(gpu)
