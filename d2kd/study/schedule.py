"""Trains what a study lacks, one run after another or several side by side, and continues where it stopped."""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TextIO

import torch
from detectron2.data import DatasetCatalog

from ..data import check_dataset
from ..errors import InputError
from .console import Progress
from .plan import Run, Study, planned, prepare
from .results import write_results
from .run import Report, finished_row, train, train_into


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
        trainer: who trains them; one after another by default.
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
    busy = {}

    def rows() -> list[dict[str, Any]]:
        return sorted(finished.values(), key=lambda row: list(study.runs).index(row["method"]))

    def close(run: Run, line: Progress, row: dict[str, Any], before: str = "") -> None:
        ap = "undefined" if row["AP"] is None else f"{row['AP']:.1f}"
        line.close(f"{before}AP {ap}, trained for {row['seconds']:.0f} s")
        finished[run.name] = row
        write_results(output, study, rows())

    while waiting or busy:
        unknown = {run.name for run in (*waiting, *(run for run, _ in busy.values()))}
        ready = [run for run in waiting if unknown.isdisjoint(run.needs)]
        chosen = ready[: trainer.jobs - len(busy)]
        for run in chosen:
            waiting.remove(run)
            folder, row = output / run.name, None
            missing = [need for need in run.needs if need not in finished]
            if not missing:
                _, key = prepare(run, finished, folder)
                row = finished_row(folder, key, run.test)
            if row is None and run.name not in asked:
                continue
            line = Progress(f"  {run.name:<{width}}", console, live=trainer.jobs == 1)
            if missing:
                line.close(f"left out, for it needs {missing[0]}")
            elif row:
                close(run, line, row, "finished before: ")
            else:
                busy[trainer.submit(run, finished, folder, line)] = run, line
        if chosen and len(busy) < trainer.jobs:
            continue  # what was finished before may have made others ready
        for future in trainer.first_done(busy) if busy else ():
            run, line = busy.pop(future)
            try:
                row = future.result()
            except InputError as error:
                failed[run.name] = error
                line.close(f"failed: {error}")
            else:
                close(run, line, row)
    return rows(), failed


class OneByOne(contextlib.AbstractContextManager):
    """Trains the runs here.

    Args:
        train: how.
    """

    jobs = 1

    def __init__(self, train: Callable = train):
        self._train = train

    def __exit__(self, *error: object) -> None:
        pass

    def ordered(self, runs: Sequence[Run]) -> list[Run]:
        """The runs as they are tried."""
        return list(runs)

    def submit(
        self, run: Run, finished: Mapping[str, Mapping], folder: Path, line: Report
    ) -> Future:
        """The future row of a run.

        Args:
            run: what to train.
            finished: rows of the runs it needs, by name.
            folder: where to train it.
            line: told of its progress.
        """
        future: Future = Future()
        try:
            future.set_result(_row(run, finished, folder, self._train, line))
        except InputError as error:
            future.set_exception(error)
        return future

    def first_done(self, futures: Collection[Future]) -> set[Future]:
        """Those that are done, once there is one."""
        return wait(futures, return_when=FIRST_COMPLETED).done


class SideBySide(OneByOne):
    """Trains several runs at a time, each in a process of its own with its share of this one's threads.

    What all seeds have in common is trained here, first and with all threads, for the others wait for it.

    Args:
        jobs: how many at a time.
        path, seeds, only, fast: what the runs were planned from; a process loads the study by itself, because
            loading it registers its data.
    """

    def __init__(
        self, jobs: int, path: str | Path, seeds: Sequence[int], only: Sequence[str], fast: bool
    ):
        super().__init__()
        self.jobs = jobs
        context = multiprocessing.get_context("spawn")
        self._lines: dict[str, Report] = {}
        self._messages = context.Queue()
        threads = max(1, torch.get_num_threads() // jobs)
        self._pool = ProcessPoolExecutor(
            jobs,
            context,
            _begin,
            (
                str(path),
                seeds,
                only,
                fast,
                threads,
                multiprocessing.get_start_method(),
                self._messages,
            ),
        )

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:  # whose runs go on another time
            for process in multiprocessing.active_children():
                process.terminate()
        self._pool.shutdown(cancel_futures=True)

    def ordered(self, runs: Sequence[Run]) -> list[Run]:
        """As :meth:`OneByOne.ordered`, those trained here first."""
        return sorted(runs, key=lambda run: not run.once)

    def submit(
        self, run: Run, finished: Mapping[str, Mapping], folder: Path, line: Report
    ) -> Future:
        """As :meth:`OneByOne.submit`."""
        if run.once:
            return super().submit(run, finished, folder, line)
        self._lines[run.name] = line
        sources = {name: finished[name] for name in run.needs}
        future = self._pool.submit(_train, run.name, sources, folder)
        future.add_done_callback(lambda _: self._lines.pop(run.name))  # its last words are others'
        return future

    def first_done(self, futures: Collection[Future]) -> set[Future]:
        """As :meth:`OneByOne.first_done`; meanwhile the runs' progress is passed on.

        Raises:
            InputError: a process has died.
        """
        done: set[Future] = set()
        while not done:
            done = wait(futures, timeout=0.2, return_when=FIRST_COMPLETED).done
            with contextlib.suppress(queue.Empty):
                while True:
                    name, step, steps = self._messages.get_nowait()
                    if line := self._lines.get(name):
                        line(step, steps)
        for future in done:
            if isinstance(future.exception(), BrokenProcessPool):
                raise InputError(
                    "--jobs",
                    "a run's process is gone",
                    f"{self.jobs} that fit into memory; the system's log tells why it ended",
                )
        return done


_runs: dict[str, Run] = {}
_tell: Callable[[tuple], None]


def _begin(
    path: str,
    seeds: Sequence[int],
    only: Sequence[str],
    fast: bool,
    threads: int,
    start_method: str,
    messages: multiprocessing.Queue,
) -> None:
    """What a process does first."""
    global _tell
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the first process gets, too
    threading.Thread(target=_end_with, args=[multiprocessing.parent_process()], daemon=True).start()
    torch.set_num_threads(threads)
    # A spawned process would spawn its loaders' workers, too, and each would import everything anew.
    multiprocessing.set_start_method(start_method, force=True)
    _, runs = planned(path, seeds, only, fast)
    _runs.update((run.name, run) for run in runs)
    _tell = messages.put


def _end_with(parent: BaseProcess) -> None:
    """End this process when that one does, or a killed study's run would go on beside the command that continues it."""
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _train(name: str, finished: Mapping[str, Mapping], folder: Path) -> dict[str, Any]:
    return _row(
        _runs[name], finished, folder, train, lambda step, steps: _tell((name, step, steps))
    )


def _row(
    run: Run, finished: Mapping[str, Mapping], folder: Path, train: Callable, line: Report
) -> dict[str, Any]:
    config, key = prepare(run, finished, folder)
    return train_into(folder, run, config, key, train, line)
