"""Two processes on a CPU are as one, a student in them is Detectron2's, and none waits for one that is gone."""

import argparse
import os
import signal
import sys

import pytest
import torch
from torch.multiprocessing import start_processes

from d2kd.engine import launch as launch_module
from d2kd.engine.launch import explaining_lost_process, launch
from d2kd.errors import InputError
from d2kd.losses import ImitationLoss
from d2kd.processes import anywhere, over_processes

from .resume_runs import OBJECTS, quiet, run
from .tiny_run import draw_data
from .two_processes import Dies, compare, in_two, stock_run


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    quiet()
    monkeypatch.setenv("D2KD_CACHE", str(tmp_path / "cache"))


def test_two_processes_are_as_one(tmp_path):
    """One by one: ``python -m tests.two_processes``."""
    verdicts = compare(tmp_path)
    assert {title: fault for title, fault in verdicts.items() if fault} == {}
    assert len(verdicts) > 25


def _one_dies(rank, folder):
    sys.stderr = open(folder / f"{rank}.txt", "w", buffering=1)
    run(stock_run(folder / "data", folder), hooks=[Dies()] if rank == 1 else [])


def test_a_process_that_dies_ends_the_other_with_a_clear_message(tmp_path):
    draw_data(tmp_path / "data", OBJECTS)
    assert in_two(_one_dies, tmp_path) == [2, -signal.SIGKILL]
    said = (tmp_path / "0.txt").read_text()
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: process 0 of 2: another process is gone (")
    assert "Connection" in line and "expected all of them alive" in line
    assert "Traceback" not in said


def test_other_errors_are_not_taken_for_it():
    with pytest.raises(RuntimeError, match="size mismatch"), explaining_lost_process():
        raise RuntimeError("size mismatch")


def _ends(rank, how):
    if rank == 0:
        signal.pause()  # for ever, unless somebody ends it
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise InputError("a.json", "broken JSON", "a COCO file")


@pytest.mark.parametrize(
    "how, message",
    [
        ("kill", "process 1 of 2 here: ended by SIGKILL; expected all of them alive"),
        ("raise", "a.json: broken JSON; expected a COCO file"),
    ],
)
def test_launch_ends_all_and_says_why(monkeypatch, how, message):
    def on_gpus(main, num_gpus, *, args, **_):
        start_processes(_ends, (how,), nprocs=num_gpus, start_method="fork")

    monkeypatch.setattr(launch_module, "launch_on_gpus", on_gpus)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    args = argparse.Namespace(num_gpus=2, num_machines=1, machine_rank=0, dist_url="auto")
    with pytest.raises(InputError) as error:
        launch(None, args)
    assert str(error.value).startswith(message)


def test_counts_of_one_process_are_its_own():
    counts = torch.tensor([0.0, 0.5, 3.0], requires_grad=True)
    assert over_processes(counts).tolist() == [1, 1, 3]
    assert over_processes(counts, 0.25).tolist() == [0.25, 0.5, 3]
    assert not over_processes(counts).requires_grad
    assert anywhere(True) and not anywhere(False)
    for across in (True, False):
        found = ImitationLoss(across_processes=across).normalizer(*counts)
        assert found.tolist() == [1, 1, 3]
