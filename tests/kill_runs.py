"""A run that is killed again and again, and ends in the very state of the one that nobody touched.

    python -m tests.kill_runs --kills 20 --seed 0

kills by SIGKILL, at random moments and at chosen points of writing a checkpoint, that of the best state included,
and cuts some of the last checkpoints short; each time the run must go on from a whole one. Prints a line for each kill
and a closing line with counts; exit code 1 if something is not as it should be.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from detectron2.config import LazyCall as L
from detectron2.evaluation import DatasetEvaluator
from omegaconf import DictConfig

from d2kd.utils import io

from .resume_runs import OBJECTS, differences, icd_one_stage, quiet, run, saved
from .tiny_run import draw_data

END, PERIOD = 12, 2
POINTS = ("half written", "written, not in place", "in place, not named as the last")
"""Of writing a checkpoint, at which a run may kill itself."""


class LastDigits(DatasetEvaluator):
    """Those of the detections' scores, as an AP: another for every state, and the best may be any of them."""

    def reset(self) -> None:
        self._sum = 0.0

    def process(self, inputs, outputs) -> None:
        self._sum += float(sum(x["instances"].scores.double().sum() for x in outputs))

    def evaluate(self) -> dict:
        return {"bbox": {"AP": self._sum * 1e6 % 100}}


def config_of(data: Path, output: Path, end: int) -> DictConfig:
    """ICD on a RetinaNet: two optimizers, a generator of its own, a running normaliser; and its best state."""
    config = icd_one_stage(data, output)
    config.train.max_iter, config.train.checkpointer.period = end, PERIOD
    config.train.eval_period, config.train.eval_teacher = PERIOD, False
    config.dataloader.evaluator = L(LastDigits)()
    config.model.student.test_score_thresh, config.model.student.test_topk_candidates = 0.0, 20
    return config


def kill_at(point: str | None, number: int) -> None:
    """Kill this process at a point of its ``number``-th checkpoint, counted from 0."""
    to_disk, replace, counted = io._to_disk, os.replace, [0]

    def of_checkpoint(path: Path) -> bool:
        return path.name.lstrip(".").startswith("model_") and ".pth" in path.name

    def die_at(here: str, path: Path) -> None:
        if of_checkpoint(path) and counted[0] == number and point == here:
            if here == POINTS[0]:
                os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def syncing(path: Path) -> None:
        die_at(POINTS[0], path)
        to_disk(path)

    def replacing(source: Path, target: Path) -> None:
        die_at(POINTS[1], Path(target))
        replace(source, target)
        die_at(POINTS[2], Path(target))
        counted[0] += of_checkpoint(Path(target))

    io._to_disk, os.replace = syncing, replacing


def _train(data: Path, output: Path, end: int, point: str | None = None, number: int = 0) -> None:
    torch.set_num_threads(1)
    kill_at(point, number)
    run(config_of(data, output, end), resume=True)


def start(*arguments) -> multiprocessing.Process:
    """The run, in a fork of its own: every part of it begins as a new process does."""
    process = multiprocessing.get_context("fork").Process(target=_train, args=arguments)
    process.start()
    return process


@dataclass
class Outcome:
    """What was done to the runs, and what was wrong with what they left."""

    kills: dict[str, int] = field(default_factory=dict)
    cut: list[Path] = field(default_factory=list)
    finished: int = 0
    faults: list[str] = field(default_factory=list)


def whole_checkpoints(output: Path, cut: list[Path]) -> dict[str, int]:
    """The next iteration of each checkpoint that can be read; those that cannot, and were not cut, are an error."""
    found = {}
    for file in sorted(output.glob("model_*.pth")):
        try:
            found[file.name] = torch.load(file, weights_only=True)["trainer"]["iteration"] + 1
        except Exception:
            if file not in cut:
                raise
    return found


def left_by(output: Path) -> dict:
    """All that a run was for: its last state, its best one, and what each evaluation gave."""
    rows = map(json.loads, (output / "metrics.json").read_text().splitlines())
    return {
        "final": saved(output / "model_final.pth"),
        "best": saved(output / "model_best.pth"),
        "reported best": json.loads((output / "model_best.json").read_text()),
        "AP": {row["iteration"]: row["bbox/AP"] for row in rows if "bbox/AP" in row},
    }


def kill(
    kills: int, seed: int, data: Path, folder: Path, end: int = END, say: Callable = print
) -> Outcome:
    """Kill runs of so many iterations until there were so many kills, and let the last one come to its end."""
    chance, outcome = random.Random(seed), Outcome()
    begun = time.perf_counter()
    assert _ended(start(data, folder / "whole", end)) == 0, "the uninterrupted run failed"
    lasts = time.perf_counter() - begun
    reference = left_by(folder / "whole")

    expected = rows = 0
    while True:
        output = folder / f"run {outcome.finished}"
        done = sum(outcome.kills.values())
        how, point, number = "none", None, 0
        if done < kills:
            # By turns, so that every point has its kills however few there are.
            how = POINTS[done // 2 % 3] if done % 2 == 0 else "a random moment"
            # Of a run from its beginning the second is that of the best state so far.
            point, number = (how, chance.randrange(3)) if how in POINTS else (None, 0)
        process = start(data, output, end, point, number)
        if how == "a random moment":
            process.join(chance.uniform(0, lasts))
            process.kill()
        code = _ended(process)
        starts = _starts(output)
        if len(starts) > rows and starts[-1] != expected:
            outcome.faults.append(f"{output.name} began at {starts[-1]} and not at {expected}")
        rows = len(starts)
        if code == 0:
            outcome.faults += differences(reference, left_by(output))
            outcome.faults += [f"{left} was left" for left in output.glob(".*")]
            outcome.finished += 1
            expected = rows = 0
            say(f"{output.name} finished")
            if done >= kills:
                return outcome
            continue
        if code != -signal.SIGKILL or how == "none":
            outcome.faults.append(f"exit code {code} after {how}")
            return outcome
        outcome.kills[how] = outcome.kills.get(how, 0) + 1
        expected = _look(output, outcome, expected, cut=done % 5 == 4)
        say(f"kill {done + 1:>2}, {output.name}, {how}: goes on at iteration {expected}")


def _ended(process: multiprocessing.Process) -> int:
    process.join()
    return process.exitcode


def _look(output: Path, outcome: Outcome, expected: int, cut: bool) -> int:
    """Where the run has to go on, by what lies there; its last checkpoint may be cut short first."""
    try:
        checkpoints = whole_checkpoints(output, outcome.cut)
    except Exception as error:
        outcome.faults.append(f"a checkpoint is not whole: {error}")
        return 0
    named = output / "last_checkpoint"
    if not named.exists():
        return 0
    last = named.read_text()
    if last not in checkpoints:  # it was cut, and nothing was written since
        return expected
    # The final state is newer than whatever else is named as the last: a run never goes back to it.
    newest, no = checkpoints[last], (last, "model_best.pth", "model_final.pth")
    older = [begin for name, begin in checkpoints.items() if name not in no and begin <= newest]
    if cut and older:
        status = (output / last).stat()
        os.truncate(output / last, status.st_size // 2)
        os.utime(output / last, ns=(status.st_atime_ns, status.st_mtime_ns))
        outcome.cut.append(output / last)
        return max(older)
    return checkpoints[last]


def _starts(output: Path) -> list[int]:
    """The first iteration of each part of a run, of those that came so far as to record it."""
    with contextlib.suppress(FileNotFoundError):
        return [row["start_iter"] for row in json.loads((output / "run.json").read_text())["rows"]]
    return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        draw_data(Path(folder, "data"), OBJECTS)
        outcome = kill(args.kills, args.seed, Path(folder, "data"), Path(folder))
    for fault in outcome.faults:
        print(f"fault: {fault}")
    kills = "; ".join(f"{how}: {count}" for how, count in outcome.kills.items())
    done = f"{outcome.finished} runs finished as the uninterrupted one bit for bit"
    cut = f"{len(outcome.cut)} last checkpoints cut short, {done}"
    count = sum(outcome.kills.values())
    print(f"{count} kills ({kills}), {cut}, {len(outcome.faults)} faults")
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())
