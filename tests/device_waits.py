"""How often a training step waits for the device: each loss on each detector family, beside the plain student.

    python -m tests.device_waits [--lines]

prints a Markdown table, measured on the stand-in device of :mod:`tests.stand_in_device`. ``--lines`` adds d2kd's lines
that wait, with their number of waits over all rows.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from d2kd.config import get_config
from d2kd.engine.train_step import TrainStep, build_amp
from d2kd.losses import (
    BCKDLoss,
    CrossKDLoss,
    CWDLoss,
    DistillLosses,
    DISTLoss,
    DKDLoss,
    ERDLoss,
    FGDLoss,
    ICDLoss,
    ImitationLoss,
    LDLoss,
    LwFLoss,
    MGDLoss,
    PGDLoss,
    PKDLoss,
    ReviewKDLoss,
    TARLoss,
)
from d2kd.losses.base import DistillLoss
from d2kd.modeling import Distiller, Teacher
from d2kd.testing import DETECTORS, batch, build
from d2kd.utils.errors import InputError

from .stand_in_device import AUTOGRAD, D2KD, DETECTRON2, DEVICE, StandIn, Wait

PLAIN = "plain student"
LOSSES: dict[str, Callable[[], DistillLoss] | None] = {
    PLAIN: None,
    "imitation": ImitationLoss,
    "TAR": TARLoss,
    "ICD": lambda: ICDLoss(heads=2),
    "LwF": LwFLoss,
    "ERD": ERDLoss,
    "DKD": DKDLoss,
    "DIST": DISTLoss,
    "PKD": PKDLoss,
    "CWD": CWDLoss,
    "MGD": MGDLoss,
    "FGD": FGDLoss,
    "ReviewKD": ReviewKDLoss,
    "FGD, published masks": lambda: FGDLoss(published_masks=True),
    "CWD of logits": lambda: CWDLoss(source="logits", valid_only=True),
    "BCKD": BCKDLoss,
    "CrossKD": CrossKDLoss,
    "PGD": PGDLoss,
    "LD": LDLoss,
}
STEPS = 2


def build_model(
    loss: str, family: str, classes: tuple[list[str], list[str]] | None = None
) -> nn.Module:
    """Return the plain student of a family, or its Distiller, in training mode.

    Args:
        classes: names of the student's three classes and the teacher's; None: those of both are the same.

    Raises:
        InputError: the loss does not support the family.
    """
    node = DETECTORS[family]
    if LOSSES[loss] is None:
        return build(node()).train()
    student, teacher = classes or (None, None)
    model = Distiller(
        student=build(node()),
        teacher=Teacher(build(node(width=6, channels=24), 1), None, classes=teacher),
        losses=DistillLosses(loss=LOSSES[loss]()),
        max_iter=2,
        classes=student,
    ).train()
    model.agreement_period = 1
    return model


@dataclass
class Trained:
    """What training steps leave.

    Attributes:
        metrics: the logged scalars of each step.
        gradients: of the last step, by name.
        parameters: after the last step, by name.
        waits: those of each step.
    """

    metrics: list[dict[str, float]]
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]
    waits: list[list[Wait]]


def train(
    model: nn.Module, device: torch.device, examples: list[dict], device_waits: list[Wait]
) -> Trained:
    """Train a model with d2kd's training step on a device.

    Args:
        device_waits: the list to which the device appends.
    """
    model.to(device)
    torch.manual_seed(0)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    settings = get_config("common/train.py").train
    loader = map(copy.deepcopy, itertools.repeat(examples))
    step = TrainStep(model, loader, optimizer, build_amp(settings.amp, device), settings)
    metrics, waits = [], []

    def keep_metrics() -> None:
        scalars = {key: value for key, (value, _) in storage.latest().items()}
        metrics.append({k: float(v) for k, v in scalars.items() if not k.endswith("time")})

    # At half of the run, when every loss has all its terms.
    with EventStorage(start_iter=1) as storage:
        for number in range(STEPS):
            device_waits.clear()
            step.run_step()
            waits.append(device_waits.copy())
            if number > 0:  # each step reads the metrics of the one before
                keep_metrics()
        step.read_metrics()
        keep_metrics()
    parameters = dict(model.named_parameters())
    gradients = {k: p.grad.cpu() for k, p in parameters.items() if p.grad is not None}
    values = {k: p.detach().cpu() for k, p in parameters.items()}
    return Trained(metrics, gradients, values, waits)


def train_on_both(model: nn.Module, examples: list[dict]) -> tuple[Trained, Trained]:
    """Train copies of a model on the CPU and on the stand-in device."""
    on_cpu = train(copy.deepcopy(model), torch.device("cpu"), examples, [])
    with StandIn() as device:
        return on_cpu, train(model, DEVICE, examples, device.waits)


def step_waits(model: nn.Module) -> list[Wait]:
    """Return what a step waits for, after the first one."""
    with StandIn() as device:
        return train(model, DEVICE, batch(), device.waits).waits[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lines", action="store_true", help="also d2kd's lines that wait")
    lines_wanted = parser.parse_args().lines
    print("Waits per step, of d2kd / of Detectron2 / of neither:\n")
    print(f"| | {' | '.join(DETECTORS)} |")
    print("|---" * (len(DETECTORS) + 1) + "|")
    lines: Counter[str] = Counter()
    for loss in LOSSES:
        cells = []
        for family in DETECTORS:
            try:
                model = build_model(loss, family)
            except InputError:  # the loss does not support this family
                cells.append("–")
                continue
            waits = step_waits(model)
            counts = Counter(wait.code for wait in waits)
            rest = len(waits) - counts[D2KD] - counts[DETECTRON2]
            cells.append(f"{counts[D2KD]} / {counts[DETECTRON2]} / {rest}")
            lines.update(
                f"`{wait.line}` {wait.operation} ({wait.kind}{', backward' * wait.in_backward})"
                for wait in waits
                if wait.code in (D2KD, AUTOGRAD)
            )
        print(f"| {loss} | {' | '.join(cells)} |", flush=True)
    if lines_wanted:
        print("\nd2kd's lines, and the number of their waits in all cells:\n")
        for line, count in lines.most_common():
            print(f"* {count}: {line}")


if __name__ == "__main__":
    # Log messages of the losses would break the table.
    logging.getLogger("d2kd").setLevel(logging.ERROR)
    main()
