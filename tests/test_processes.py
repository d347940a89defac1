"""Two processes on a CPU are as one, a student in them is Detectron2's, and none waits for one that is gone."""

import argparse
import os
import signal
import sys
import weakref

import pytest
import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch.multiprocessing import start_processes
from torch.multiprocessing.spawn import ProcessRaisedException

from d2kd.engine import launch as launch_module
from d2kd.engine.launch import launch, pick_device, process_group, report_lost_process
from d2kd.losses import ImitationLoss
from d2kd.utils.comm import any_rank, reduce_mean
from d2kd.utils.errors import InputError

from .resume_runs import OBJECTS, run
from .tiny_run import draw_data
from .two_processes import Dies, compare, in_two, stock_run


def test_two_processes_are_as_one(tmp_path):
    """One by one: ``python -m tests.two_processes``."""
    verdicts = compare(tmp_path)
    assert {title: fault for title, fault in verdicts.items() if fault} == {}
    assert len(verdicts) > 50


def _one_dies(rank, folder):
    sys.stderr = open(folder / f"{rank}.txt", "w", buffering=1)
    run(stock_run(folder / "data", folder), hooks=[Dies()] if rank == 1 else [])


def test_a_process_that_dies_ends_the_other_with_a_clear_message(tmp_path):
    draw_data(tmp_path / "data", OBJECTS)
    assert in_two(_one_dies, tmp_path) == [2, -signal.SIGKILL]
    printed = (tmp_path / "0.txt").read_text()
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: process 0 of 2: another process is gone (")
    assert "Connection" in line and "expected all of them alive" in line
    assert "Traceback" not in printed


def _use_everything_that_keeps_a_group():
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    model.itself = [model]  # as a trainer and its hooks hold each other
    model(torch.ones(1, 2)).sum().backward()
    assert comm.all_gather("all") == ["all"] and comm.get_local_rank() == 0
    comm._get_global_gloo_group()
    return [weakref.ref(group) for group in (dist.group.WORLD, comm._LOCAL_PROCESS_GROUP)]


def test_no_group_lives_until_python_ends(monkeypatch):
    """Its threads might then be killed in the middle of an operation, and the process with them."""
    address = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    for name, value in address.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "0")  # any that is free
    with process_group("cpu"):
        groups = _use_everything_that_keeps_a_group()
    assert [group() for group in groups] == [None, None]
    assert not dist.is_initialized()


def _ends(args):
    if args.how == "kill":
        if comm.get_rank() == 0:
            signal.pause()  # for ever, unless somebody ends it
        os.kill(os.getpid(), signal.SIGKILL)
    raise InputError("a.json", "broken JSON", "a COCO file")


def _begins(rank, main, args):
    comm.get_rank = lambda: rank
    main(*args)


@pytest.fixture
def launched(monkeypatch):
    """Whatever ends in two processes of its own, as on two GPUs."""

    def on_gpus(main, num_gpus, *, args, **_):
        start_processes(_begins, (main, args), nprocs=num_gpus, start_method="fork")

    monkeypatch.setattr(launch_module, "launch_on_gpus", on_gpus)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    args = argparse.Namespace(num_gpus=2, num_machines=1, machine_rank=0, dist_url="auto")
    return lambda how, **more: launch(_ends, argparse.Namespace(how=how, **vars(args), **more))


def test_launch_ends_all_and_says_why(launched):
    with pytest.raises(InputError) as error:
        launched("kill")
    message = "process 1 of 2 here: ended by SIGKILL; expected all of them alive"
    assert str(error.value).startswith(message)


def test_input_that_every_process_refuses_is_told_of_once(launched, capfd):
    with pytest.raises(SystemExit, match="2"):
        launched("raise")
    printed = capfd.readouterr().err  # beside torch's line about a process that it had to end
    assert printed.count("error: a.json: broken JSON; expected a COCO file\n") == 1
    assert printed.count("error") == 1 and "Traceback" not in printed
    with pytest.raises(ProcessRaisedException, match="Traceback"):
        launched("raise", debug=True)


def test_counts_of_one_process_are_its_own():
    counts = torch.tensor([0.0, 0.5, 3.0], requires_grad=True)
    assert reduce_mean(counts).tolist() == [1, 1, 3]
    assert reduce_mean(counts, 0.25).tolist() == [0.25, 0.5, 3]
    assert not reduce_mean(counts).requires_grad
    assert any_rank(True) and not any_rank(False)
    for across in (True, False):
        found = ImitationLoss(across_processes=across).normalizer(*counts)
        assert found.tolist() == [1, 1, 3]


@pytest.mark.parametrize(
    "name, there, line",
    [
        ("cuda", 0, "train.device: cuda, and no CUDA here; expected auto or cpu"),
        ("cuda:7", 1, "train.device: cuda:7, of 1 CUDA devices; expected auto, or one that"),
    ],
)
def test_a_device_that_is_not_there(refuses, monkeypatch, name, there, line):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    refuses(lambda: pick_device(name), line)


def test_only_a_process_that_is_gone_is_an_error_of_one_line(refuses):
    def lost(message):
        with report_lost_process():
            raise RuntimeError(message)

    message = "[gloo/transport/tcp/pair.cc:1] Connection closed by peer. See\nbelow"
    line = r"process 0 of 1: another process is gone \(Connection closed by peer\); expected"
    refuses(lambda: lost(message), line)
    with pytest.raises(RuntimeError, match="size mismatch"):
        lost("size mismatch")
