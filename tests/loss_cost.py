"""What each method's own loss costs, forward and backward, beside the student's step and the teacher's forward.

    python -m tests.loss_cost [--steps 12] [--image-size 320] [--families faster_rcnn …]

prints a Markdown table, of an R-50 student and an R-101 teacher, both untrained, on two generated images, in CPU seconds of
this process. In each step the student trains alone, and every method computes its teacher outputs and then its loss, whose
gradient ends at the student's outputs. So neither the student's nor the teacher's own work is in the loss. Medians are shown.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from d2kd.benchmark.untrained import measure_norm_statistics, random_batch
from d2kd.config import METHODS, distill, method, with_defaults, without_priors, without_weights
from d2kd.losses import DistillLoss
from d2kd.modeling import DetectorOutputs, Distiller
from d2kd.modeling.outputs import OutputDict, capture, lazy_property
from d2kd.utils.errors import InputError

FAMILIES = {
    "faster_rcnn": (
        "baselines/faster_rcnn_R_50_FPN_1x.py",
        "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml",
    ),
    "retinanet": (
        "COCO-Detection/retinanet_R_50_FPN_1x.py",
        "COCO-Detection/retinanet_R_101_FPN_3x.yaml",
    ),
    "gfl": ("baselines/gfl_R_50_FPN_1x.py", "baselines/gfl_R_101_FPN_2x.py"),
}
"""Recipes of student and teacher."""

BATCHES = 3
PROGRESS = 0.5


def build(name: str, family: str) -> Distiller:
    """Return the Distiller of a method with its defaults.

    Raises:
        InputError: the method does not serve the family.
    """
    base, teacher = FAMILIES[family]
    config = with_defaults(distill(base, teacher=(teacher, "unused"), **method(name)))
    config.train.seed = 0
    config.model = without_weights(config.model)
    config.model.teacher.weights = None
    without_priors(config.model.losses)
    return instantiate(config.model).train()


def detached(outputs: DetectorOutputs) -> list[Tensor]:
    """Let the gradient of a student's outputs end at these; return the tensors at which it ends."""
    ends: list[Tensor] = []

    def end(x: Tensor) -> Tensor:
        ends.append(x.detach().requires_grad_(x.is_floating_point()))
        return ends[-1]

    outputs.features = OutputDict({name: end(x) for name, x in outputs.features.items()})
    outputs.taps = OutputDict(
        {name: [end(x) for x in calls] for name, calls in outputs.taps.items()}
    )
    if "predictions" in vars(outputs):
        outputs.predictions = tuple([end(x) for x in levels] for levels in outputs.predictions)
    if vars(outputs).get("predictor_calls"):
        outputs.predictor_calls = [
            (inputs, tuple(end(x) for x in predicted))
            for inputs, predicted in outputs.predictor_calls
        ]
    if vars(outputs).get("mask_calls"):
        call, (inputs, logits) = outputs.mask_calls
        outputs.mask_calls = call, (inputs, end(logits))
    return ends


def timed(function: Callable) -> tuple[float, object]:
    start = time.process_time()
    found = function()
    return time.process_time() - start, found


def train(student: nn.Module, batch: list[dict], hook_points: dict, taps: dict) -> tuple:
    """Run forward and backward of the student alone; return the recorded calls of hook points and taps."""
    with capture(hook_points) as calls, capture(taps) as tapped:
        losses = student(batch)
    sum(losses.values()).backward()
    return calls, tapped


class Measured:
    """A method's loss beside a student and a teacher that all methods share."""

    def __init__(self, model: Distiller, student: nn.Module, teacher: nn.Module):
        (self.loss,) = model.losses.by_name.values()
        self.loss: DistillLoss
        self.taps, self.teacher_taps = model.taps, model.teacher_taps
        self.teacher = model.teacher
        self.teacher.detector = teacher
        self.loss.progress = PROGRESS
        self.read: tuple[str, ...] = ()

    def step(self, student: DetectorOutputs, batch: list[dict]) -> tuple[float, float]:
        """Return the seconds of the teacher's outputs and of the loss, forward and backward."""
        teacher = self.teacher.outputs(batch, taps=self.teacher_taps)
        teacher.set_region_boxes(student.region_boxes, student.mask_boxes)
        ends = detached(student)
        seconds, _ = timed(lambda: [getattr(teacher, name) for name in self.read])

        def loss() -> None:
            terms = self.loss(student, teacher)
            total = sum(terms.values()) if isinstance(terms, dict) else terms
            learned = [p for p in self.loss.parameters() if p.requires_grad]
            torch.autograd.grad(total, [*ends, *learned], allow_unused=True)

        loss_seconds, _ = timed(loss)
        kind = type(teacher)
        self.read = tuple(
            n for n in vars(teacher) if isinstance(getattr(kind, n, None), lazy_property)
        )
        return seconds, loss_seconds


def measure(family: str, steps: int, side: int, names: Iterable[str]) -> list[tuple]:
    """Return rows of method and medians: student's step, teacher's outputs, loss."""
    models = {}
    for name in names:
        try:
            models[name] = build(name, family)
        except InputError:
            continue
    first = next(iter(models.values()))
    student, teacher = first.student, first.teacher.detector
    batches = [random_batch(student, (side, side), 2, seed) for seed in range(BATCHES)]
    for detector in (student, teacher):
        measure_norm_statistics(detector, batches)
    measured = {name: Measured(model, student, teacher) for name, model in models.items()}
    taps = {name: student.get_submodule(name) for x in measured.values() for name in x.taps}
    seconds = defaultdict(list)
    kind = first.outputs_class
    hook_points = kind.hook_points(student)
    for number in range(steps + 1):
        batch = batches[number % BATCHES]
        seed_all_rng(number)
        with EventStorage(start_iter=1):
            student.zero_grad()
            own, (calls, tapped) = timed(partial(train, student, batch, hook_points, taps))
            for name, method_of in measured.items():
                outputs = kind.from_calls(student, batch, calls, tapped)
                found = own, *method_of.step(outputs, batch)
                if number:  # the first says what is read
                    seconds[name].append(found)
    return [(name, *np.median(found, axis=0)) for name, found in seconds.items()]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.loss_cost", description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--image-size", type=int, default=320)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("d2kd", "fvcore", "detectron2"):  # their messages would break the table
        logging.getLogger(name).setLevel(logging.ERROR)
    print(
        "| Method | Student | student's step, s | teacher, s | loss, s | loss of student + teacher |"
    )
    print("|---|---|---|---|---|---|")
    for family in args.families:
        for name, student, teacher, loss in measure(
            family, args.steps, args.image_size, args.methods
        ):
            share = loss / (student + teacher)
            print(
                f"| {name} | {family} | {student:.2f} | {teacher:.2f} | {loss:.3f} | {share:.1%} |"
            )


if __name__ == "__main__":
    main()
