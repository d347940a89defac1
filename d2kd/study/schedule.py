"""Trains what a study lacks, one run after another or several side by side, and continues where it stopped."""

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
from ..utils.console import Progress, quiet
from ..utils.errors import InputError
from ..utils.io import read_rows, write_json
from .plan import Run, Study, prepare, timed_recipes
from .results import cost_text, write_results
from .run import Measured, Report, finished_row, threads, train, train_apart, train_into

STEP_COST = "step_cost.json"
"""In a study's folder: what distilled steps cost in plain ones."""


def run_study(
    study: Study,
    runs: Sequence[Run],
    output: Path,
    trainer: OneByOne | None = None,
    console: TextIO | None = None,
    others: Sequence[Run] = (),
) -> tuple[list[dict[str, Any]], dict[str, InputError]]:
    """Train what is missing; after each run, write what all have reached.

    A run that cannot go on, say for a non-finite loss, takes along those that need it; the others go on.

    Args:
        study: whose runs these are.
        runs: of :meth:`Study.plan`.
        output: the study's folder; each run has one of its own in it.
        trainer: who trains them; one after another, in this process, by default.
        console: where progress is shown; stdout by default.
        others: further runs, whose rows count where they are finished; they are not trained. Those in ``runs``
            may be among them.

    Returns:
        the rows of ``results.json``, method by method, and the errors of the runs that failed, by name.

    Raises:
        InputError: the test split cannot be read; it is looked at first, and drawn if it is generated.
    """
    for test in dict.fromkeys([study.test, *(run.test for run in runs)]):
        for name in check_dataset(test):
            DatasetCatalog.get(name)  # a class step is known to have objects once it is loaded
    trainer, console = trainer or OneByOne(), console or sys.stdout
    finished: dict[str, dict[str, Any]] = {}
    failed: dict[str, InputError] = {}
    width = max(len(run.name) for run in runs)
    asked = {run.name for run in runs}
    # First, so that also an interrupted command leaves their rows in the table.
    waiting = [*(run for run in others if run.name not in asked), *trainer.ordered(runs)]
    busy: dict[str, tuple[Run, Progress, Iterator[None]]] = {}

    def rows() -> list[dict[str, Any]]:
        return sorted(finished.values(), key=lambda row: list(study.runs).index(row["method"]))

    def line_of(run: Run) -> Progress:
        return Progress(f"  {run.name:<{width}}", console, live=trainer.jobs == 1)

    def close(run: Run, line: Progress, row: dict[str, Any], before: str = "") -> None:
        ap = "undefined" if row["AP"] is None else f"{row['AP']:.1f}"
        line.close(f"{before}AP {ap}, trained for {row['seconds']:.0f} s")
        finished[run.name] = row
        write_results(output, study, rows())

    def fail(run: Run, line: Progress, error: InputError) -> None:
        failed[run.name] = error
        line.close(f"failed: {error}")

    def step_cost(run: Run) -> dict[str, Any] | None:
        """What was measured for an equal-time run; it is measured now if nothing else is going on."""
        *recipes, key = timed_recipes(run, finished, output / run.name)
        costs = read_rows(output / STEP_COST)
        cost = next((row for row in costs if row.get("recipes_sha256") == key), None)
        if cost is None and run.name in asked and not busy:
            line = Progress(f"  {run.method:<{width}}  cost of a step", console)
            found = trainer.step_cost(*recipes, line)
            line.close(cost_text(found, "a plain step"))
            cost = {"method": run.method, "recipes_sha256": key, **found}
            write_json(output / STEP_COST, {"schema": 1, "rows": [*costs, cost]})
        return cost and {name: cost[name] for name in COST}

    def begin(run: Run) -> bool:
        """Begin a run, or be done with it; False if it has to wait until nothing else is going on."""
        folder, cost = output / run.name, None
        missing = [need for need in run.needs if need not in finished]
        if missing:
            if run.name in asked:
                line_of(run).close(f"left out, for it needs {missing[0]}")
            return True
        if run.steps_like is not None:
            try:
                cost = step_cost(run)
            except InputError as error:
                fail(run, line_of(run), error)
                return True
            if cost is None:
                return run.name not in asked
        config, key = prepare(run, finished, folder, cost and cost["ratio"])
        row = finished_row(folder, key, run.test)
        if row is not None:
            close(run, line_of(run), row, "finished before: ")
        elif run.name in asked:
            if busy and run.once:  # it has all threads
                return False
            line = line_of(run)
            training = train_into(folder, run, config, key, trainer.train, line, cost)
            busy[run.name] = run, line, training
        return True

    try:
        while waiting or busy:
            unknown = {run.name for run in waiting} | busy.keys()
            ready = [run for run in waiting if unknown.isdisjoint(run.needs)]
            for run in ready if not busy else ():  # or later others would have to wait for it
                if run.steps_like is not None and finished.keys() >= set(run.needs):
                    with contextlib.suppress(InputError):  # it fails again where its run begins
                        step_cost(run)
            for run in ready:
                alone = any(other.once for other, *_ in busy.values())
                if alone or len(busy) == trainer.jobs or not begin(run):
                    break
                waiting.remove(run)
                if run.name in finished:
                    break  # others may be ready now
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


COST = ("ratio", "low", "high", "pairs", "clock")
"""What a row says of the cost of a step, see :class:`d2kd.benchmark.step_cost.StepCost`."""


def measured_step_cost(distilled: DictConfig, plain: DictConfig, report: Report) -> dict[str, Any]:
    """See :func:`d2kd.benchmark.step_cost.step_cost`."""
    from ..benchmark.step_cost import step_cost  # late, for it shows progress as studies do

    with quiet():
        return asdict(step_cost(distilled, plain, report=report))


class OneByOne:
    """Trains the runs one after another, in this process.

    Args:
        train: how.
        step_cost: how a distilled step is compared with a plain one.
    """

    jobs = 1

    def __init__(
        self,
        train: Callable[[DictConfig, str, Report], Measured] = train,
        step_cost: Callable[[DictConfig, DictConfig, Report], dict] = measured_step_cost,
    ):
        self._train, self._step_cost = train, step_cost

    def ordered(self, runs: Sequence[Run]) -> list[Run]:
        """The runs as they are tried."""
        return list(runs)

    def step_cost(self, distilled: DictConfig, plain: DictConfig, report: Report) -> dict[str, Any]:
        """What a distilled step costs in plain ones; nothing is trained meanwhile."""
        return self._step_cost(distilled, plain, report)

    def train(self, run: Run, config: DictConfig, report: Report) -> Iterator[None]:
        """Train a run, see :func:`.train_into`."""
        yield from ()
        return self._train(config, run.test, report)


class Commands(OneByOne):
    """Trains each run by the training command, several at a time, each with its share of this process's threads.

    What all seeds have in common is trained first, alone and with all threads, for the others wait for it. Each run
    has a GPU of its own where there are as many.

    Args:
        jobs: how many at a time.
    """

    def __init__(self, jobs: int = 1):
        super().__init__()
        self.jobs = jobs
        self._all = torch.get_num_threads()
        self._share = max(1, self._all // jobs)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        count = torch.cuda.device_count()
        self._gpus = visible.split(",")[:count] if visible else [str(k) for k in range(count)]
        self._taken: list[str | None] = []  # a GPU as often as it is in use

    def ordered(self, runs: Sequence[Run]) -> list[Run]:
        """As :meth:`OneByOne.ordered`, those of all seeds first where there are several at a time."""
        return sorted(runs, key=lambda run: not run.once) if self.jobs > 1 else list(runs)

    def step_cost(self, distilled: DictConfig, plain: DictConfig, report: Report) -> dict[str, Any]:
        """As :meth:`OneByOne.step_cost`, with the threads that a run has."""
        with threads(self._share):
            return super().step_cost(distilled, plain, report)

    def train(self, run: Run, config: DictConfig, report: Report) -> Iterator[None]:
        """As :meth:`OneByOne.train`."""
        count = self._all if run.once else self._share
        gpu = min(self._gpus, key=self._taken.count, default=None)
        self._taken.append(gpu)
        try:
            return (yield from train_apart(config, run.test, report, count, gpu))
        finally:
            self._taken.remove(gpu)
