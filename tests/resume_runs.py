"""Every method stopped in the middle and resumed, beside its uninterrupted run: equal to the last bit or not.

    python -m tests.resume_runs

prints a line for each case and a closing line with counts; exit code 1 if one differs.
"""

from __future__ import annotations

import logging
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig

from d2kd.config import get_config, incremental_recipe, with_defaults
from d2kd.data import estimate_priors
from d2kd.engine import Trainer
from d2kd.losses import DistillLosses, ERDLoss, ICDLoss, ImitationLoss, LwFLoss, TARLoss
from d2kd.testing import tiny_faster_rcnn, tiny_fcos, tiny_gfl, tiny_retinanet
from d2kd.utils.console import LOGGERS

from .tiny_run import distiller, draw_data, recipe, without_evaluation

STOP, END = 3, 6
OBJECTS = (1, 2, 0, 3, 2, 3, 1, 3)
"""In each image; all three classes are among them."""


def _taught(data: Path, output: Path, loss: DictConfig, node=tiny_faster_rcnn) -> DictConfig:
    config = recipe(data, output, distiller(losses=L(DistillLosses)(loss=loss)), max_iter=END)
    config.model.student, config.model.teacher.detector = node(), node(channels=24)
    return without_evaluation(config)


def plain(data: Path, output: Path) -> DictConfig:
    """A RetinaNet alone: its running normaliser; and the best state of three evaluations."""
    return recipe(data, output, tiny_retinanet(), max_iter=END, eval_period=2)


def imitation(data: Path, output: Path) -> DictConfig:
    return _taught(data, output, L(ImitationLoss)())


def tar(data: Path, output: Path, node=tiny_faster_rcnn) -> DictConfig:
    return _taught(data, output, L(TARLoss)(), node)


def icd(data: Path, output: Path, node=tiny_faster_rcnn) -> DictConfig:
    """A decoder with an optimizer of its own; fakes from a generator of its own; beginning in between."""
    priors = L(estimate_priors)(names="${dataloader.train.dataset.names}")
    loss = L(ICDLoss)(heads=4, aux_warmup=0.3, start=0.3, priors=priors)
    config = _taught(data, output, loss, node)
    config.train.clip_gradients = {"enabled": True, "clip_value": 0.5}
    config.train.loss_optimizer = get_config("common/icd.py").loss_optimizer
    return config


def icd_one_stage(data: Path, output: Path) -> DictConfig:
    return icd(data, output, tiny_retinanet)


def gfl_increment(data: Path, output: Path, increment: int, **options) -> DictConfig:
    base = without_evaluation(recipe(data, output, tiny_gfl(), max_iter=END))
    parts = incremental_recipe(base, split="2+1", increment=increment, **options)
    return DictConfig(parts._asdict(), flags={"allow_objects": True})


def _second_increment(data: Path, output: Path, loss: DictConfig) -> DictConfig:
    weights = output.parent.parent / "first step" / "resumed" / "model_final.pth"
    losses = L(DistillLosses)(loss=loss)
    return gfl_increment(data, output, 2, weights=str(weights), losses=losses)


def erd(data: Path, output: Path) -> DictConfig:
    """The second increment, taught by what the resumed first one left."""
    return _second_increment(data, output, L(ERDLoss)())


def lwf(data: Path, output: Path) -> DictConfig:
    return _second_increment(data, output, L(LwFLoss)())


def in_bfloat16(case: Callable) -> Callable:
    def config(data: Path, output: Path) -> DictConfig:
        made = case(data, output)
        made.train.amp = {"enabled": True, "dtype": "bfloat16"}
        return made

    return config


def adamw(data: Path, output: Path) -> DictConfig:
    """Moments of two orders, and a worker that has read ahead."""
    config = imitation(data, output)
    config.dataloader.train.num_workers = 1
    del config.optimizer["momentum"]
    config.optimizer._target_ = torch.optim.AdamW
    config.optimizer.lr, config.optimizer.betas = 1e-4, (0.9, 0.99)
    return config


CASES: dict[str, Callable[[Path, Path], DictConfig]] = {
    "alone": plain,
    "imitation": imitation,
    "imitation, AdamW, a worker": adamw,
    "tar": tar,
    "tar, one-stage": partial(tar, node=tiny_retinanet),
    "tar, points": partial(tar, node=tiny_fcos),
    "icd": icd,
    "icd, one-stage": icd_one_stage,
    "first step": partial(gfl_increment, increment=1),
    "erd": erd,
    "lwf": lwf,
}
"""Recipes by case, functions of the data's folder and the run's; the second increment follows the first."""
for _name in ("alone", "imitation", "tar", "icd", "erd", "lwf"):
    CASES[f"{_name}, bfloat16"] = in_bfloat16(CASES[_name])


class Stopped(BaseException):
    """Ends a run as a signal would."""


class KeepLosses(HookBase):
    """Keeps every loss of every iteration, and may end the run."""

    def __init__(self, stop: int | None = None):
        self.received: dict[int, dict[str, float]] = {}
        self._stop = stop

    def after_step(self) -> None:
        now, latest = self.trainer.iter, self.trainer.storage.latest()
        self.received[now] = {k: v for k, (v, _) in latest.items() if "loss" in k}
        if self._stop is not None and now + 1 == self._stop:
            raise Stopped


def run(config: DictConfig, *, resume: bool = False, stop: int | None = None, hooks=()):
    """Train; the trainer, and every loss by iteration."""
    trainer = Trainer(config)
    trainer.resume_or_load(resume)
    losses_kept = KeepLosses(stop)
    trainer.register_hooks([losses_kept, *hooks])
    try:
        trainer.train()
    except Stopped:
        pass
    return trainer, losses_kept.received


def differences(one, other, name: str = "") -> list[str]:
    """Where two states differ, by so little as a bit or a type."""
    if type(one) is not type(other):
        return [name]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [name]
        return [d for k in one for d in differences(one[k], other[k], f"{name}.{k}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [name]
        return differences(dict(enumerate(one)), dict(enumerate(other)), name)
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
    else:
        same = one == other
    return [] if same else [name]


def saved(file: Path) -> dict:
    """A checkpoint, but for the time it took; read without trust."""
    checkpoint = torch.load(file, weights_only=True)
    del checkpoint["trainer"]["seconds"]
    return checkpoint


def stock(config: DictConfig, wrap: Callable = lambda model: model) -> torch.nn.Module:
    """The student of a recipe as Detectron2 trains it, in as many processes as there are."""
    config = with_defaults(config)
    seed, steps = config.train.seed, config.train.max_iter
    seed_all_rng(seed)
    model = instantiate(config.model.student)
    config.optimizer.params.model = model
    optimizer = instantiate(config.optimizer)
    seed_all_rng(seed + comm.get_rank())
    trainer = SimpleTrainer(wrap(model), instantiate(config.dataloader.train), optimizer)
    schedule = LRMultiplier(optimizer, instantiate(config.lr_multiplier), max_iter=steps)
    seed_all_rng(seed + comm.get_rank())
    with EventStorage() as storage:
        for step in range(steps):
            storage.iter = trainer.iter = step
            trainer.run_step()
            schedule.step()
    return model


def in_a_process(function: Callable, *args) -> int:
    """Run a function in a fork: what this process has computed before must not matter. The exit code."""
    process = multiprocessing.get_context("fork").Process(target=_alone, args=(function, *args))
    process.start()
    process.join()
    return process.exitcode


def _alone(function: Callable, *args) -> None:
    torch.set_num_threads(1)
    function(*args)


def compare(name: str, data: Path, folder: Path, stop: int = STOP) -> list[str]:
    """What differs between an uninterrupted run and one that was stopped and resumed; [] if nothing does."""
    make = CASES[name]
    whole, parts = folder / name / "whole", folder / name / "resumed"
    outcome = []
    for output, ends in ((whole, [None]), (parts, [stop, None])):
        received: dict[int, dict[str, float]] = {}
        for i, end in enumerate(ends):
            config = make(data, output)
            config.train.checkpointer.period = stop
            printed = output.with_name(f"{output.name}.{i}.pth")
            if in_a_process(_part, config, i > 0, end, printed) != 0:
                return [f"part {i} of {output.name} failed"]
            began, more = torch.load(printed)
            if began != stop * i:
                return [f"the resumed run began at {began}"]
            received |= more
        files = {file.name: saved(file) for file in sorted(output.glob("model_*.pth"))}
        outcome.append({"losses": received, **files})
    return differences(*outcome)


def _part(config: DictConfig, resume: bool, stop: int | None, printed: Path) -> None:
    printed.parent.mkdir(parents=True, exist_ok=True)
    trainer, received = run(config, resume=resume, stop=stop)
    torch.save((trainer.start_iter, received), printed)


def quiet() -> None:
    """Keep the runs' logs from the console."""
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
        logging.getLogger(name).propagate = False
        logging.getLogger(name).addHandler(logging.NullHandler())


def main() -> int:
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        draw_data(data, OBJECTS)
        broken = 0
        for name in CASES:
            found = compare(name, data, Path(folder))
            broken += bool(found)
            printed = f"differs in {len(found)}, such as {found[0]}" if found else "equal"
            print(f"{name:32} stopped at {STOP} of {END}: {printed}", flush=True)
    print(
        f"{len(CASES) - broken} of {len(CASES)} resumed runs are their uninterrupted ones bit for bit: "
        "losses, weights, optimizers, generators, best state"
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
