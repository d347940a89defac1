"""Two processes on a CPU (gloo) beside one: what must not depend on how a batch is dealt to them.

    python -m tests.two_processes

prints a line for each comparison and a closing line with counts; exit code 1 if one fails.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from detectron2.config import LazyCall as L
from detectron2.engine import HookBase
from detectron2.structures import Boxes, Instances
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from d2kd.config import with_defaults
from d2kd.engine import do_test
from d2kd.engine.launch import process_group
from d2kd.losses import DistillLosses, ImitationLoss
from d2kd.testing import tiny_faster_rcnn, tiny_retinanet
from d2kd.utils.errors import report_input_errors

from .common import one_thread
from .recorded import LOSSES, Recorded, relative
from .resume_runs import OBJECTS, differences, erd, gfl_increment, quiet, run, saved, stock
from .tiny_run import distiller, draw_data, recipe, without_evaluation

BOUND = 1e-5
DEALS = {"one has no ground truth": [[0, 1], [2, 3]], "unevenly": [[0], [1, 2, 3]]}
DIVIDED = [name for name, case in LOSSES.items() if not case.by_process]
LOCAL_NAMES = ("imitation", "tar", "tar, one-stage", "icd", "erd", "lwf")
STUDENTS = {"Faster R-CNN": tiny_faster_rcnn, "RetinaNet": tiny_retinanet}


def loss_difference(name: str, parts: list[tuple[Tensor, dict]], deal: list[list[int]]) -> float:
    """The largest relative difference of value and gradients, of two processes from one."""
    recorded = Recorded(name)
    whole, gradients = recorded.loss([0, 1, 2, 3])
    assert whole > 0 and all(x.isfinite().all() for x in gradients.values())
    found = [relative(sum(value for value, _ in parts) / 2, whole)]
    for key, gradient in gradients.items():
        if key.startswith("student."):
            of_two = torch.cat([part[key] for _, part in parts]) / 2
            of_one = torch.cat([recorded.by_image(key, gradient, images) for images in deal])
        else:
            of_two, of_one = sum(part[key] for _, part in parts) / 2, gradient
        if of_one.norm() > 1e-8:
            found.append(relative(of_two, of_one))
    return max(found)


# Whole runs


def gfl_run(data: Path, folder: Path) -> DictConfig:
    return gfl_increment(data, folder / "first step" / "resumed", 1)


def erd_run(data: Path, folder: Path) -> DictConfig:
    """A student that has inherited nothing, for a copy of its teacher would have little to learn of it."""
    config = erd(data, folder / "erd" / "run")
    config.model.inherit = []
    config.model.teacher.weights = str(folder.parent / "two/first step/resumed/model_final.pth")
    return config


def taught_run(data: Path, folder: Path) -> DictConfig:
    """A student whose norms are synchronised, and losses with adapters."""
    losses = L(DistillLosses)(imitation=L(ImitationLoss)(weight=0.1))
    config = recipe(data, folder / "norms", distiller(losses=losses), max_iter=1)
    config.model.student, config.model.teacher.detector = tiny_retinanet(), tiny_retinanet(6, 24)
    config.model.student.backbone.bottom_up.norm = "naiveSyncBN"
    return without_evaluation(config)


def stock_run(data: Path, folder: Path, node: Callable = tiny_faster_rcnn) -> DictConfig:
    config = recipe(data, folder / "stock", distiller(), max_iter=4, seed=3)
    config.model.student, config.model.teacher.detector = node(), node(channels=24)
    return without_evaluation(config)


in_ddp = functools.partial(DistributedDataParallel, broadcast_buffers=False)


def state(student: torch.nn.Module) -> dict:
    """Its weights, and what a dense detector counts and keeps beside them."""
    return {**student.state_dict(), "normalizer": getattr(student, "loss_normalizer", None)}


def evaluation(data: Path, folder: Path) -> dict:
    """What the evaluator makes of the annotations, a little beside where they are, image by image more."""
    content = json.loads((data / "data.json").read_text())

    def detect(batched_inputs: list[dict]) -> list[dict]:
        found = []
        for x in batched_inputs:
            i = x["image_id"]
            truth = [a for a in content["annotations"] if a["image_id"] == i]
            boxes = torch.tensor([a["bbox"] for a in truth]).reshape(-1, 4) + i % 4
            boxes[:, 2:] += boxes[:, :2]
            printed = Instances((x["height"], x["width"]), pred_boxes=Boxes(boxes))
            printed.scores = torch.full((len(truth),), 1 / (1 + i))
            printed.pred_classes = torch.tensor([a["category_id"] - 1 for a in truth]).long()
            found.append({"instances": printed})
        return found

    return do_test(with_defaults(recipe(data, folder / "evaluation")), detect)


def resumable_run(data: Path, output: Path) -> DictConfig:
    config = without_evaluation(recipe(data, output, tiny_retinanet(), max_iter=4))
    config.train.checkpointer.period = 2
    return config


def _work(rank: int, folder: Path) -> None:
    """All that one of two processes does; what it found is in ``<rank>.pth``."""
    data, found = folder / "data", {}
    for name in DIVIDED:
        for title, deal in DEALS.items():
            found["losses", name, title] = RECORDED[name].loss(deal[rank])
    for name in LOCAL_NAMES:
        found["local", name] = LOCAL[name].loss(DEALS["unevenly"][rank])
    two = folder / "two"
    for make in (gfl_run, erd_run):
        found[make.__name__] = run(make(data, two))[1]
    trainer, found["norms"] = run(taught_run(data, two))
    found["statistics"] = trainer.model.module.student.state_dict()
    for name, node in STUDENTS.items():
        trainer, _ = run(stock_run(data, two / name, node))
        alone = stock(stock_run(data, two / name, node), in_ddp)
        found["stock", name] = differences(state(trainer.model.module.student), state(alone))
        found["unused", name] = trainer.model.find_unused_parameters
    config = resumable_run(data, two / "whole")
    run(config)
    for stop in (2, None):
        run(resumable_run(data, two / "parts"), resume=stop is None, stop=stop)
    for name in ("data", "single"):
        found["evaluation", name] = evaluation(folder / name, two)
    torch.save(found, folder / f"{rank}.pth")


RECORDED: dict[str, Recorded] = {}
LOCAL: dict[str, Recorded] = {}


def in_two(function: Callable, folder: Path, *arguments) -> list[int]:
    """Run ``function(rank, …)`` in two forks that are one group; their exit codes."""
    context = multiprocessing.get_context("fork")
    port = str(_free_port())
    both = [
        context.Process(target=_joined, args=(rank, port, function, folder, *arguments))
        for rank in range(2)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(300)
        process.kill()  # of no effect on one that has ended
        process.join()
    return [process.exitcode for process in both]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _joined(rank: int, port: str, function: Callable, *arguments) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with report_input_errors(), process_group("cpu"):
        function(rank, *arguments)


def compare(folder: Path) -> dict[str, str]:
    """Everything, by what it is: "" if it holds, or what was found instead."""
    with one_thread():  # as either of the two has
        return _compare(folder)


def _compare(folder: Path) -> dict[str, str]:
    data = folder / "data"
    draw_data(data, OBJECTS[:7])
    draw_data(folder / "single", (2,))
    # Recorded before there are two: a GFL's own losses would count over both.
    RECORDED.update({name: Recorded(name) for name in DIVIDED})
    LOCAL.update({name: Recorded(name, across_processes=False) for name in LOCAL_NAMES})
    codes = in_two(_work, folder)
    if codes != [0, 0]:
        return {"two processes": f"exit codes {codes}"}
    both = [torch.load(folder / f"{rank}.pth", weights_only=False) for rank in range(2)]

    verdicts = {}

    def close(title: str, found: float) -> None:
        verdicts[f"{title} (to {found:.0e})"] = "" if found <= BOUND else f"apart by {found:.1e}"

    def same(title: str, one, other=()) -> None:
        found = differences(one, other) if other else one
        fault = f"{len(found)} differ, such as {found[0]}" if found else ""
        verdicts[f"{title}, bit for bit"] = fault

    for name in DIVIDED:
        for title, deal in DEALS.items():
            parts = [found["losses", name, title] for found in both]
            close(f"loss and gradients of {name}, {title}", loss_difference(name, parts, deal))
    for name in LOCAL_NAMES:
        local = [found["local", name] for found in both]
        alone = [RECORDED[name].loss(images) for images in DEALS["unevenly"]]
        same(f"the local form of {name} is that of a process alone", local, alone)
        apart = loss_difference(name, local, DEALS["unevenly"])
        verdicts[f"and differs from {name} over both"] = "" if apart > 1e-3 else f"by {apart:.1e}"

    one = folder / "one"
    for make, name in ((gfl_run, "first step/resumed"), (erd_run, "erd/run")):
        _, received = run(make(data, one))
        apart = [
            # A divergence near 0 is a difference of numbers near 1.
            abs(both[0][make.__name__][i][k] - v) / max(abs(v), 0.01 * row["total_loss"])
            for i, row in received.items()
            for k, v in row.items()
        ]
        close(f"losses of each step of {name.split('/')[0]}", max(apart))
        momenta = [_momenta(saved(folder / n / name / "model_final.pth")) for n in ("two", "one")]
        close(f"gradients' momenta after the steps of {name.split('/')[0]}", relative(*momenta))
    trainer, received = run(taught_run(data, one))
    statistics = [{k: v for k, v in s["statistics"].items() if "running" in k} for s in both]
    same("statistics of synchronised norms in both", *statistics)
    means = {k: v for k, v in trainer.model.student.state_dict().items() if "running_mean" in k}
    means = [torch.cat([s[k] for k in means]) for s in (statistics[0], means)]
    close("and those of one process", relative(*means))
    # The student's own are not to be compared: each process divides them by its own normalizer, as in Detectron2.
    (of_two,), (alone,) = both[0]["norms"].values(), received.values()
    of_two, alone = (row["distill/loss_imitation"] for row in (of_two, alone))
    close("imitation of their features", abs(of_two - alone) / alone)
    for name in STUDENTS:
        differing = both[0]["stock", name] + both[1]["stock", name]
        same(f"the part of the student, a {name}, is Detectron2's", differing)
        unused = both[0]["unused", name]
        verdicts[f"no search for unused parameters of a {name}"] = str(unused or "")
    files = [saved(folder / "two" / part / "model_final.pth") for part in ("whole", "parts")]
    same("resumed in two is uninterrupted in two", *files)
    normalizers = {process["loss_normalizer"] for process in files[0]["processes"]}
    verdicts["with a normalizer of each"] = "" if len(normalizers) == 2 else "they are equal"
    for name, what in (("data", "7 images"), ("single", "one image")):
        expected, found = evaluation(folder / name, one), both[0]["evaluation", name]
        assert 0 < expected["bbox"]["AP"] <= 100
        verdicts[f"evaluation of {what}"] = "" if repr(found) == repr(expected) else repr(found)
    return verdicts


def _momenta(checkpoint: dict) -> Tensor:
    state = checkpoint["trainer"]["_trainer"]["optimizer"]["state"]
    return torch.cat([x["momentum_buffer"].flatten() for x in state.values()])


# A process that dies


class Dies(HookBase):
    """Ends this process by a signal after the first iteration."""

    def after_step(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    quiet()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):  # COCO's talk
        verdicts = compare(Path(folder))
    for title, fault in verdicts.items():
        print(f"{title}: {fault or 'holds'}")
    kept = sum(not fault for fault in verdicts.values())
    count = f"{kept} of {len(verdicts)} comparisons of two processes with one hold"
    print(f"{count}, bound {BOUND:.0e}")
    return 0 if kept == len(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
