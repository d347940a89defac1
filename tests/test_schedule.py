"""Runs of a study in processes of their own: the same results as in this one, and none left running when one fails."""

import io
import json
import multiprocessing.connection
import os
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf

from d2kd.study import ParallelRunner, load_study, run_study, schedule
from d2kd.study import run as training
from d2kd.utils.errors import InputError

from . import common
from .common import one_thread
from .resume_runs import differences
from .tiny_run import draw_data

STUDY = """
from pathlib import Path
import copy
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.config import LazyCall as L
from d2kd.losses import DistillLosses, ImitationLoss
from tests.common import tiny_faster_rcnn
from tests.tiny_run import distiller, recipe

_data = Path({data!r})

def _taught(losses):
    return dict(config=recipe(_data, Path("none"), distiller(losses=losses), max_iter=2), teacher="teacher")

_plain = recipe(_data, Path("none"), max_iter=2)
_broken = copy.deepcopy(_plain)
_broken.optimizer.lr = float("inf")
# What only this file knows: a class, a lambda, a data set.
class Identity:
    def __init__(self, of):
        self.of = of

    def __call__(self, data):
        return self.of(data)

if "of_this_study" not in DatasetCatalog.list():
    DatasetCatalog.register("of_this_study", lambda: load_coco_json(f"{{_data}}/data.json", str(_data), "of_this_study"))
_imitation = _taught(L(DistillLosses)(imitation=L(ImitationLoss)()))
_train = _imitation["config"].dataloader.train
_train.dataset.names, _train.mapper = "of_this_study", L(Identity)(of=_train.mapper)
study = dict(test=_plain.dataloader.test.dataset.names, baseline="baseline")
runs = dict(
    baseline=dict(config=_plain),
    imitation=_imitation,
    longer=dict(config=_plain, init_from="baseline"),
    teacher=dict(config=recipe(_data, Path("none"), tiny_faster_rcnn(channels=24), max_iter=2), shared_across_seeds=True),
    broken=dict(config=_broken, optional=True),
    needy=dict(config=_plain, init_from="broken", optional=True),
)
"""


@pytest.fixture(autouse=True)
def alike():
    with one_thread():  # as each of two has on two cores, for the same results
        yield


@pytest.fixture
def file(tmp_path):
    draw_data(tmp_path / "data")
    file = tmp_path / "study.py"
    file.write_text(STUDY.format(data=str(tmp_path / "data")))
    return file


@pytest.fixture
def command(file, monkeypatch):
    """``d2kd study`` with the study, from an empty folder."""
    monkeypatch.chdir(file.parent)
    return lambda words: common.command("study")([file, *words.split()])


def run(file, output, seeds=(), only=(), trainer=None, console=None):
    study = load_study(file)
    return run_study(study, study.plan(seeds, only), output, trainer, console or io.StringIO())


@pytest.mark.sweep
def test_commands_side_by_side_are_one_by_one_in_this_process(command, file, tmp_path, capsys):
    """To the last bit: weights, figures; also of what only the study's own file defines and registers."""
    command("--seeds 3 --runs baseline imitation --jobs 2 --output two")
    printed = capsys.readouterr().out
    names = [line.split()[0] for line in printed.splitlines() if " AP " in line]
    assert set(names[:2]) == {"teacher", "baseline_seed3"}  # beside each other
    assert "two/report.html" in printed
    assert (tmp_path / "two/report.html").exists() and (tmp_path / "two/curves.png").exists()
    rows = json.loads((tmp_path / "two/results.json").read_text())["rows"]
    one, _ = run(file, tmp_path / "one", [3], ["baseline", "imitation"])
    assert [row["name"] for row in rows] == [row["name"] for row in one]
    assert {row["name"] for row in rows} == {"teacher", "baseline_seed3", "imitation_seed3"}
    for row, other in zip(rows, one):
        measured = ("AP", "AP50", "per_class", "parameters")
        assert [row[key] for key in measured] == [other[key] for key in measured]
        assert row["seconds"] > 0 and (sys.platform != "linux" or row["peak_memory_mib"] > 0)
        states = [torch.load(r["weights"], weights_only=True)["model"] for r in (row, other)]
        assert differences(*states) == [], row["name"]
    command("--seeds 3 --runs baseline imitation --jobs 2 --output two")
    assert capsys.readouterr().out.count("finished before") == 3


def test_a_run_that_fails_is_told_and_takes_along_only_what_needs_it(command, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        command("--runs baseline needy --jobs 2")
    assert exit.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith("error: ") and "Traceback" not in printed.err
    assert "at iteration" in printed.err and "; expected a finite number" in printed.err
    assert "skipped, since it needs broken_seed0" in printed.out
    rows = json.loads((tmp_path / "output" / "study" / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["baseline_seed0"]


def test_the_command_tried_fast(command, tmp_path, capsys):
    command("--fast --runs baseline")
    assert "the figures mean nothing" in capsys.readouterr().out
    assert (tmp_path / "output" / "study_fast" / "results.json").exists()


def trained_by(code, monkeypatch):
    """In place of the training command a few words of Python; the run's folder is ``folder``."""
    first = "import os, pathlib, signal, sys, time; folder = pathlib.Path(sys.argv[1]).parent\n"
    command = [sys.executable, "-c", first + code]
    monkeypatch.setattr(training, "training_command", lambda config_file: [*command, config_file])


@pytest.mark.parametrize(
    "code, found",
    [
        ("os.abort()", "ended by SIGABRT"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "ended by SIGKILL"),
        ("1 / 0", "exit code 1, ZeroDivisionError: division by zero"),
        ("sys.exit(3)", "exit code 3"),
    ],
)
def test_a_process_that_dies_is_named_and_its_output_kept(file, tmp_path, monkeypatch, code, found):
    trained_by(code, monkeypatch)
    printed, only = io.StringIO(), ["baseline", "imitation"]
    rows, failed = run(file, tmp_path / "out", [0], only, ParallelRunner(2), printed)
    assert rows == [] and set(failed) == {"teacher", "baseline_seed0"}
    error = str(failed["baseline_seed0"])
    assert error.startswith(f"baseline_seed0: {found}") and "\n" not in error
    assert f"failed: {error}" in printed.getvalue()
    kept = tmp_path / "out" / "baseline_seed0" / "stderr.txt"
    assert kept.exists() and str(kept) in error
    assert ("ZeroDivisionError" in kept.read_text()) == ("1 / 0" in code)


def test_what_is_refused_before_its_first_step_leaves_no_trace(file, tmp_path, monkeypatch):
    line = "error: a.pth: missing: all of it; expected a file"
    code = f"print({line!r}, 'and more', sep=chr(10), file=sys.stderr); sys.exit(2)"
    trained_by(code, monkeypatch)
    rows, failed = run(file, tmp_path / "out", [0], ["baseline"], ParallelRunner())
    assert [f"error: {error}" for error in failed.values()] == [line] and rows == []
    assert not (tmp_path / "out").exists()


def test_an_interruption_leaves_nothing_running(file, tmp_path, monkeypatch):
    trained_by("(folder / 'metrics.json').touch(); time.sleep(600)", monkeypatch)
    started, metrics = [], tmp_path / "out" / "baseline_seed0" / "metrics.json"

    class Started(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)

    def interrupt_once_it_trains(seconds):
        if metrics.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(training.subprocess, "Popen", Started)
    monkeypatch.setattr(schedule.time, "sleep", interrupt_once_it_trains)
    with pytest.raises(KeyboardInterrupt):
        run(file, tmp_path / "out", [0], ["baseline"], ParallelRunner(2))
    [process] = started
    assert process.returncode is not None
    assert metrics.exists()  # and the next command goes on from there


def _begin_and_wait(folder, reported):
    config = OmegaConf.create(dict(model={}, train=dict(output_dir=folder, max_iter=1)))
    going_on = training.train_in_subprocess(config, "", print, 1, None)
    next(going_on)
    reported.send(going_on.gi_frame.f_locals["process"].pid)
    reported.recv()


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="only Linux shows a grandchild's end")
def test_a_killed_study_leaves_nothing_running(tmp_path, monkeypatch):
    """Or the command that continues it would train beside what still trains."""
    trained_by("time.sleep(600)", monkeypatch)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    study = context.Process(target=_begin_and_wait, args=(str(tmp_path), there))
    study.start()
    running = os.pidfd_open(here.recv())
    study.kill()
    assert multiprocessing.connection.wait([running], timeout=60)
    study.join()
    os.close(running)


class Beside(ParallelRunner):
    """Two at a time, each for a few rounds; nothing is computed. Who trains beside whom is remembered."""

    def __init__(self, monkeypatch):
        super().__init__(jobs=2)
        self.running, self.seen = [], []
        monkeypatch.setattr(schedule.time, "sleep", lambda seconds: None)

    def train(self, run, config, report):
        self.running.append(run.name)
        for _ in range(3):
            self.seen.append(tuple(self.running))
            yield
        self.running.remove(run.name)
        raise InputError(run.name, "nothing trained", "no more than this")

    def step_cost(self, distilled, plain, report):
        self.seen.append(("cost", *self.running))
        return dict(ratio=1.5, low=1.0, high=2.0, pairs=12, clock="cpu seconds")


def test_no_place_stays_free_because_of_a_run_finished_before(file, tmp_path, monkeypatch):
    run(file, tmp_path / "out", [0], ["baseline"])
    beside = Beside(monkeypatch)
    run(file, tmp_path / "out", [0, 1], ["baseline", "longer"], beside)
    assert set(beside.seen[1]) == {"longer_seed0", "baseline_seed1"}


def test_what_all_seeds_have_in_common_starts_first_and_others_beside_it(
    file, tmp_path, monkeypatch
):
    beside = Beside(monkeypatch)
    run(file, tmp_path / "out", [0, 1], ["baseline", "teacher"], beside)
    assert beside.seen[:2] == [("teacher",), ("teacher", "baseline_seed0")]
    assert max(map(len, beside.seen)) == 2


def test_a_step_is_timed_while_nothing_else_is_trained(file, tmp_path, monkeypatch):
    """And at the first such moment, so that no place waits for it later."""
    run(file, tmp_path / "out", [0], ["teacher"])
    equal = "runs = dict(equal=dict(config=_plain, match_time_of='imitation'),"
    file.write_text(file.read_text().replace("runs = dict(", equal))
    beside = Beside(monkeypatch)
    run(file, tmp_path / "out", [0, 1], ["baseline", "teacher", "equal"], beside)
    assert beside.seen[0] == ("cost",) and ("cost",) not in beside.seen[1:]
    assert sum("equal" in name for name in beside.seen[-1]) >= 1


def test_each_has_its_share_of_the_threads_and_of_the_gpus(file, tmp_path, monkeypatch):
    given = []

    def apart(config, test, report, count, gpu):
        given.append((config.train.output_dir.rsplit("/", 1)[1], count, gpu))
        yield
        yield
        raise InputError("nothing", "trained", "no more than this")

    monkeypatch.setattr(schedule, "train_in_subprocess", apart)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    run(file, tmp_path / "out", [0, 1], ["baseline", "teacher"], ParallelRunner(2))
    assert given[:2] == [("teacher", 2, "5"), ("baseline_seed0", 2, "7")]
    assert given[2][:2] == ("baseline_seed1", 2)
    for seeds, expected in (([0], [(4, "5")]), ([0, 1, 2], [(1, "5"), (1, "7"), (1, "5")])):
        given.clear()
        run(file, tmp_path / "out", seeds, ["baseline"], ParallelRunner(len(seeds)))
        assert [share for _, *share in given] == [list(one) for one in expected]
