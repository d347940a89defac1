"""Runs of a study side by side: the same results as one by one, and nothing left running when one fails."""

import io
import json
import multiprocessing.connection
import os
import signal

import pytest
import torch

from d2kd.errors import InputError
from d2kd.study import OneByOne, SideBySide, load, run_study

from . import common
from .common import one_thread
from .tiny_run import draw_data

STUDY = """
from pathlib import Path
import copy, os
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
_deadly = copy.deepcopy(_plain)
_deadly.dataloader.train.sampler = L(os.abort)()
study = dict(test=_plain.dataloader.test.dataset.names, baseline="baseline")
runs = dict(
    baseline=dict(config=_plain),
    imitation=_taught(L(DistillLosses)(imitation=L(ImitationLoss)())),
    longer=dict(config=_plain, starts_from="baseline"),
    teacher=dict(config=recipe(_data, Path("none"), tiny_faster_rcnn(channels=24), max_iter=2), once=True),
    broken=dict(config=_broken, optional=True),
    needy=dict(config=_plain, starts_from="broken", optional=True),
    deadly=dict(config=_deadly, optional=True),
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


def run(file, output, seeds=(), only=(), jobs=2, console=None):
    study = load(file)
    runs = study.plan(seeds, only)
    with SideBySide(jobs, file, seeds, only, False) if jobs > 1 else OneByOne() as trainer:
        return run_study(study, runs, output, trainer, console or io.StringIO())


def test_side_by_side_is_one_by_one(file, tmp_path):
    said = io.StringIO()
    rows, failed = run(file, tmp_path / "two", console=said)
    assert not failed
    assert said.getvalue().splitlines()[0].split()[0] == "teacher"  # which others wait for
    one, _ = run(file, tmp_path / "one", jobs=1)
    assert [row["name"] for row in rows] == [row["name"] for row in one]
    assert len(rows) == 4
    for row, other in zip(rows, one):
        assert (row["AP"], row["parameters"]) == (other["AP"], other["parameters"])
        ours, theirs = (torch.load(r["weights"], weights_only=True)["model"] for r in (row, other))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items()), row["name"]
    again = io.StringIO()
    run(file, tmp_path / "two", console=again)
    assert again.getvalue().count("finished before") == 4


def test_its_processes_start_others_as_this_one_does(file):
    """Loaders' workers, which would each import everything anew if they were spawned."""
    with SideBySide(2, file, [], [], False) as trainer:
        started = trainer._pool.submit(multiprocessing.get_start_method).result()
    assert started == multiprocessing.get_start_method()


def test_a_failing_run_takes_along_only_what_needs_it(file, tmp_path):
    said = io.StringIO()
    rows, failed = run(file, tmp_path / "out", [0], ["baseline", "needy", "longer"], console=said)
    assert {row["name"] for row in rows} == {"baseline_seed0", "longer_seed0"}
    assert list(failed) == ["broken_seed0"] and isinstance(failed["broken_seed0"], InputError)
    assert "left out, for it needs broken_seed0" in said.getvalue()


def test_a_process_that_dies_is_told_from_an_error(file, tmp_path):
    with pytest.raises(InputError, match="--jobs: a run's process is gone; expected 2 that fit"):
        run(file, tmp_path / "out", [0], ["deadly"])
    assert not multiprocessing.active_children()


def test_an_interruption_leaves_nothing_running(file, tmp_path):
    class Console(io.StringIO):
        def write(self, text):
            if "step" in text:
                raise KeyboardInterrupt
            return super().write(text)

    with pytest.raises(KeyboardInterrupt):
        run(file, tmp_path / "out", [0], ["baseline"], console=Console())
    assert not multiprocessing.active_children()
    rows, failed = run(file, tmp_path / "out", [0], ["baseline"])
    assert not failed and rows[0]["AP"] is not None


def _begin_and_wait(file, told):
    with SideBySide(2, file, [], [], False) as trainer:
        told.send(trainer._pool.submit(os.getpid).result())
        trainer._pool.submit(signal.pause).result()


@pytest.mark.skipif(
    not hasattr(os, "pidfd_open"), reason="the end of a grandchild is seen on Linux"
)
def test_a_killed_study_leaves_nothing_running(file):
    """Or the command that continues it would train beside what still trains."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    study = context.Process(target=_begin_and_wait, args=(str(file), there))
    study.start()
    running = os.pidfd_open(here.recv())
    study.kill()
    assert multiprocessing.connection.wait([running], timeout=60)
    study.join()
    os.close(running)


def test_no_place_stays_free_because_of_a_run_finished_before(file, tmp_path):
    class Two(OneByOne):
        jobs, busy = 2, []

        def first_done(self, futures):
            self.busy.append(len(futures))
            return super().first_done(futures)

    run(file, tmp_path / "out", [0], ["baseline"], jobs=1)
    study = load(file)
    runs = study.plan([0], ["baseline", "imitation", "longer"])
    rows, failed = run_study(study, runs, tmp_path / "out", Two(), io.StringIO())
    assert not failed and len(rows) == len(runs) == 4
    assert Two.busy[0] == 2  # the teacher, and what starts from the finished baseline


@pytest.fixture
def command(file, monkeypatch):
    """``d2kd study`` with the study, from an empty folder."""
    monkeypatch.chdir(file.parent)
    return lambda words: common.command("study")([file, *words.split()])


def test_the_command_trains_shows_and_names_the_page(command, tmp_path, capsys):
    command("--seeds 3 --runs baseline imitation")
    folder = tmp_path / "output" / "study"
    said = capsys.readouterr().out
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert {row["name"] for row in rows} == {"teacher", "baseline_seed3", "imitation_seed3"}
    assert f"{folder.relative_to(tmp_path)}/report.html" in said
    assert (folder / "report.html").exists() and (folder / "curves.png").exists()
    command("--seeds 3 --runs baseline --jobs 2 --output elsewhere")
    rows = json.loads((tmp_path / "elsewhere" / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["baseline_seed3"]


def test_the_command_tried_fast(command, tmp_path, capsys):
    command("--fast --runs baseline")
    assert "the figures mean nothing" in capsys.readouterr().out
    assert (tmp_path / "output" / "study_fast" / "results.json").exists()


def test_the_command_tells_of_a_run_that_failed_and_keeps_the_others(command, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        command("--runs broken baseline")
    assert exit.value.code == 2
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].startswith("error: ") and "Traceback" not in said.err
    rows = json.loads((tmp_path / "output" / "study" / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["baseline_seed0"]
