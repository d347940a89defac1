"""What distillation costs: seconds and memory of a training step, beside those of its parts.

Three rows are measured on the same detectors and batches: the student's own step, what the losses ask of the
teacher and nothing else, and the distilled step. If listening were free, the third would be the sum of the others.

Nothing is read but the recipe. The detectors are untrained, their batch norms live with statistics of the batches
they see (frozen ones at their initial values let an untrained net explode); the images are noise. All steps stand
half-way through the run, where a loss that decays or begins late is on, with a learning rate too small to move
anything.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.layers import FrozenBatchNorm2d
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig, ListConfig, OmegaConf
from tabulate import tabulate
from torch import nn

from .classes import num_classes_of
from .config import is_distiller, load, without_priors
from .engine.launch import pick_device
from .engine.optimizer import build_optimizer
from .engine.run_info import versions
from .engine.step import NotFinite, Step, precision
from .engine.trainer import complete
from .errors import InputError
from .modeling import DetectorOutputs, Distiller, Teacher
from .modeling.outputs import asked
from .study.console import Progress

STUDENT, TEACHER, DISTILLED = "student alone", "teacher's asked part alone", "distilled"
HEADLINE = "distilled / (student + teacher)"
"""The ratio a bound is about."""

BATCHES = 5  # the norms' statistics come from them, and the rounds go round them
OBJECTS = 7
WARM_UPS = 3
LEARNING_RATE = 1e-6
SEED = 0
MIB = 2**20


@dataclass(frozen=True)
class Setup:
    """What is to be measured.

    Args:
        config_file: a distilled recipe, see :func:`d2kd.config.load`.
        overrides: such as ``model.losses.tar.weight=1.0``.
        image_size: sides of the square images, in pixels.
        batch_size: images in a batch.
        device: instead of the recipe's ``train.device``.

    Raises:
        InputError: a size that is none; by :meth:`recipe` what cannot be loaded, or has no teacher.
    """

    config_file: str
    overrides: tuple[str, ...] = ()
    image_size: int = 320
    batch_size: int = 2
    device: str | None = None

    def __post_init__(self):
        for culprit, value in (("image size", self.image_size), ("batch size", self.batch_size)):
            if value < 1:
                raise InputError(culprit, value, "at least 1")

    def recipe(self) -> DictConfig:
        """The recipe, made to need neither weights nor data."""
        config = complete(load(self.config_file, self.overrides))
        if not is_distiller(config.model):
            raise InputError(
                self.config_file, "a plain recipe", "a distilled one, whose model is a Distiller"
            )
        config.model.teacher.weights = None
        without_priors(config.model.losses)
        thaw_norms(config.model)
        if self.device:
            config.train.device = self.device
        return config


def thaw_norms(node: DictConfig | ListConfig) -> None:
    """Write BN for FrozenBN wherever a model node, or a yacs config in it, names a norm."""
    for key in range(len(node)) if OmegaConf.is_list(node) else list(node):
        if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            continue
        if OmegaConf.is_config(node[key]):
            thaw_norms(node[key])
        elif str(key).lower() == "norm" and node[key] == "FrozenBN":
            node[key] = "BN"


@torch.no_grad()
def measure_statistics(detector: nn.Module, batches: Sequence[list[dict]]) -> None:
    """Give every batch norm the mean statistics of these batches in train mode.

    Those of stages that ``freeze_at`` froze take part and are frozen again.
    """
    frozen = {n: m for n, m in detector.named_modules() if isinstance(m, FrozenBatchNorm2d)}
    for name, norm in frozen.items():
        live = nn.BatchNorm2d(norm.num_features, norm.eps).to(norm.weight.device)
        live.load_state_dict(norm.state_dict(), strict=False)
        detector.set_submodule(name, live)
    norms = [
        m
        for m in detector.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches, not a moving one
    training = detector.training
    detector.train()
    with EventStorage():
        for batch in batches:
            detector(batch)
    detector.train(training)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    for name, norm in frozen.items():
        live = detector.get_submodule(name)
        norm.running_mean.copy_(live.running_mean)
        norm.running_var.copy_(live.running_var)
        detector.set_submodule(name, norm)


def draw_batch(detector: nn.Module, image_size: int, batch_size: int, seed: int) -> list[dict]:
    """Detectron2's training batch for this detector: images of noise with seven objects each.

    The objects' sides go from a sixteenth to two thirds of the image's, their classes over all that the
    detector is to learn; with a mask head they have masks, their rectangles.
    """
    random = np.random.default_rng(seed)
    batch = []
    for _ in range(batch_size):
        side = np.geomspace(1 / 16, 2 / 3, OBJECTS)
        stretch = np.exp(random.uniform(-0.3, 0.3, OBJECTS))
        extent = np.stack([side * stretch, side / stretch], axis=1)
        corner = random.uniform(size=(OBJECTS, 2)) * (1 - extent)
        boxes = np.concatenate([corner, corner + extent], axis=1) * image_size
        instances = Instances((image_size, image_size))
        instances.gt_boxes = Boxes(torch.from_numpy(boxes).float())
        first = getattr(detector, "num_old_classes", 0)
        classes = np.linspace(first, num_classes_of(detector) - 1, OBJECTS)
        classes = classes.round().astype(np.int64)
        instances.gt_classes = torch.from_numpy(random.permutation(classes))
        if getattr(getattr(detector, "roi_heads", None), "mask_on", False):
            corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]]
            instances.gt_masks = PolygonMasks([[polygon] for polygon in corners])
        image = random.integers(256, size=(3, image_size, image_size), dtype=np.uint8)
        size = {"height": image_size, "width": image_size}
        batch.append({"image": torch.from_numpy(image), "instances": instances, **size})
    return batch


@dataclass(frozen=True)
class Row:
    """Something to be measured: a step, a function of the batch's number, and the modules it keeps."""

    step: Callable[[int], None]
    modules: tuple[nn.Module, ...]

    @property
    def weights(self) -> int:
        """Bytes of parameters and buffers."""
        tensors = [t for m in self.modules for t in (*m.parameters(), *m.buffers())]
        return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True)
class Question:
    """What was asked of a teacher in a step: what the student shared, and what the losses read, in order."""

    shared: dict[str, Any]
    read: tuple[str, ...]


class Bench:
    """A recipe's detectors and batches, ready to be measured row by row.

    Student and distilled step train the same student. The teacher is asked what the losses read in a step
    on the same batch, as its outputs tell afterwards: work a loss does with the teacher's modules by itself counts
    for the distilled step alone.

    Attributes:
        device: where it runs.
        batches: five, drawn from a fixed seed.
        questions: for each batch, what is asked of the teacher.
        rows: by name. They own all that is large, so a row that is taken out of here is freed.

    Raises:
        InputError: see :class:`Setup`; or a loss is not finite.
    """

    def __init__(self, setup: Setup):
        config = setup.recipe()
        self.device = pick_device(config.train.device)
        self.sizes = setup.image_size, setup.batch_size
        self._precision = precision(config.train.amp, self.device)
        seed_all_rng(SEED)
        model = instantiate(config.model).to(self.device).train()
        student, teacher = model.student, model.teacher
        self._start_iter = model.max_iter // 2
        self.batches = self._draw(student)
        try:
            measure_statistics(student, self.batches)
            # With objects of its own: it may know other classes.
            theirs = self._draw(teacher.detector)
            measure_statistics(teacher.detector, [teacher.own_inputs(batch) for batch in theirs])
            self.questions = [self._listen(model, batch) for batch in self.batches]
        except FloatingPointError as error:  # Detectron2's, of proposals
            raise InputError(
                setup.config_file, error, "untrained detectors that their norms keep finite"
            ) from error
        self.rows = {
            STUDENT: Row(self._training(config, student), (student,)),
            TEACHER: Row(self._asking(teacher), (teacher.detector,)),
            DISTILLED: Row(self._training(config, model), (model, teacher.detector)),
        }

    def _draw(self, detector: nn.Module) -> list[list[dict]]:
        return [draw_batch(detector, *self.sizes, seed=SEED + i) for i in range(BATCHES)]

    @contextlib.contextmanager
    def _half_way(self) -> Iterator[None]:
        """Half-way through the run, with random draws that are the same for every row."""
        seed_all_rng(SEED)
        with EventStorage(start_iter=self._start_iter):
            yield

    def _listen(self, model: Distiller, batch: list[dict]) -> Question:
        heard: list[DetectorOutputs] = []
        ask = model.teacher.ask
        model.teacher.ask = lambda *args, **kwargs: heard.append(ask(*args, **kwargs)) or heard[-1]
        try:
            with self._half_way(), self._precision[0]():
                model(batch)
        finally:
            del model.teacher.ask
        (outputs,) = heard
        kind = type(outputs)
        known = [name for name in vars(outputs) if hasattr(kind, name)]
        read = tuple(name for name in known if isinstance(getattr(kind, name), asked))
        return Question({name: vars(outputs)[name] for name in known if name not in read}, read)

    def _training(self, config: DictConfig, model: nn.Module) -> Callable[[int], None]:
        optimizer = build_optimizer(config, model)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE
        trainer = Step(model, (), optimizer, self._precision, config.train)

        def step(number: int) -> None:
            trainer.feed([self.batches[number]])
            try:
                trainer.run_step()
            except NotFinite as error:
                raise InputError(error.culprit, error.value, "a finite number") from None

        return step

    def _asking(self, teacher: Teacher) -> Callable[[int], None]:
        def step(number: int) -> None:
            question = self.questions[number]
            with self._precision[0]():
                outputs = teacher.ask(self.batches[number], **question.shared)
                for name in question.read:
                    getattr(outputs, name)

        return step

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, name: str, number: int) -> float:
        """Seconds of one step of a row on one of the batches."""
        with self._half_way():
            self._synchronize()
            start = time.perf_counter()
            self.rows[name].step(number)
            self._synchronize()
            return time.perf_counter() - start

    def measure(self, rounds: int, report: Callable[[int, int], None]) -> dict[str, list[float]]:
        """Seconds of each row in each round, all rows of a round on the same batch, each the first in turn.

        Args:
            rounds: how many, after three that are not counted.
            report: told (rounds done, rounds in all) before each.
        """
        names = list(self.rows)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for k in range(WARM_UPS + rounds):
            report(k, WARM_UPS + rounds)
            first = k % len(names)
            for name in names[first:] + names[:first]:
                seconds[name].append(self.seconds(name, k % BATCHES))
        return {name: values[WARM_UPS:] for name, values in seconds.items()}

    def peak(self, name: str) -> tuple[int, int | None]:
        """Let go of the other rows, and take a step of this one on each batch.

        Returns:
            bytes of the modules it keeps; and bytes at the peak, these included, or None where the system does
            not tell.
        """
        row = self.rows[name]
        self.rows = {name: row}

        def steps() -> None:
            for number in range(BATCHES):
                self.seconds(name, number)

        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            steps()
            return row.weights, torch.cuda.max_memory_allocated(self.device)
        grown = growth(steps)
        return row.weights, None if grown is None else row.weights + grown


def growth(action: Callable[[], Any]) -> int | None:
    """Bytes by which an action raises this process's resident memory at most; None where Linux does not tell.

    ``getrusage`` would not do: its peak is that of the process's whole life, and of its parent's.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # or the action would fill what is free but still resident
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew, see proc(5)
    except OSError:
        return None
    before = _status("VmRSS")
    action()
    return max(_status("VmHWM") - before, 0)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith(f"{key}:"))
    return int(kib) * 1024


def peak_memory(setup: Setup, name: str) -> tuple[int, int | None]:
    """:meth:`Bench.peak` of a row, in a fresh process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak, setup, name).result()


def _peak(setup: Setup, name: str) -> tuple[int, int | None]:
    return Bench(setup).peak(name)


def median_interval(values: Sequence[float], draws: int = 10_000) -> dict[str, float]:
    """The median, and the 2.5th and 97.5th percentile of the medians of bootstrap samples (seeded)."""
    values = np.asarray(values, dtype=float)
    samples = np.random.default_rng(SEED).choice(values, (draws, len(values)))
    low, high = np.percentile(np.median(samples, axis=1), [2.5, 97.5])
    return {"median": float(np.median(values)), "low": float(low), "high": float(high)}


def ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Intervals of what the rows cost relative to each other, round by round."""
    student, teacher, distilled = (
        np.asarray(seconds[name]) for name in (STUDENT, TEACHER, DISTILLED)
    )
    return {
        HEADLINE: median_interval(distilled / (student + teacher)),
        "teacher / student": median_interval(teacher / student),
        "distilled / student": median_interval(distilled / student),
    }


def benchmark(setup: Setup, rounds: int = 15, console: TextIO | None = None) -> dict[str, Any]:
    """Measure time, all rows in this process, then memory, each row in one of its own.

    Args:
        setup: what to measure.
        rounds: how often each row is timed.
        console: where progress is shown; stdout by default.

    Returns:
        what the JSON file holds: the circumstances, ``asked`` (what the losses read of the teacher), ``rows`` of
        ``name``, ``median_seconds``, ``seconds`` by round, ``peak_memory_mib`` (of weights and steps; None if
        unknown) and ``weights_mib``, and ``ratios`` with ``median``, ``low`` and ``high``.

    Raises:
        InputError: see :class:`Bench`; or no rounds.
    """
    if rounds < 1:
        raise InputError("rounds", rounds, "at least 1")
    console = console or sys.stdout
    setup.recipe()  # so that one that cannot be used is all there is to say
    print(f"building, and statistics of {BATCHES} batches …", file=console, flush=True)
    bench = Bench(setup)
    line = Progress("time", console)
    seconds = bench.measure(rounds, line)
    line.close(f"{rounds} rounds, after {WARM_UPS} to warm up")
    device, read = bench.device, [name for q in bench.questions for name in q.read]
    del bench
    gc.collect()  # its rows refer to it

    line = Progress("memory", console)
    rows = []
    for name, values in seconds.items():
        line(len(rows), len(seconds))
        weights, peak = peak_memory(setup, name)
        rows.append(
            {
                "name": name,
                "median_seconds": float(np.median(values)),
                "seconds": values,
                "peak_memory_mib": None if peak is None else peak / MIB,
                "weights_mib": weights / MIB,
            }
        )
    line.close(f"{len(rows)} rows, each in a process of its own")
    return {
        "schema": 1,
        "command": shlex.join(sys.argv),
        "versions": versions(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "config": setup.config_file,
        "overrides": list(setup.overrides),
        "image_size": setup.image_size,
        "batch_size": setup.batch_size,
        "rounds": rounds,
        "asked": list(dict.fromkeys(read)),
        "rows": rows,
        "ratios": ratios(seconds),
    }


def table(result: Mapping[str, Any]) -> str:
    """A result of :func:`benchmark` as text."""
    size = result["image_size"]
    threads = f", threads: {result['threads']}" if result["device"] == "cpu" else ""
    rows = [
        [row["name"], row["median_seconds"], row["peak_memory_mib"], row["weights_mib"]]
        for row in result["rows"]
    ]
    compared = [[name, *interval.values()] for name, interval in result["ratios"].items()]
    return "\n".join(
        [
            f"{result['config']}: {size} x {size} px, {result['batch_size']} images a batch, "
            f"{OBJECTS} objects an image, {result['device']}{threads}; half-way through the run",
            f"asked of the teacher: {', '.join(result['asked']) or 'nothing'}",
            "",
            tabulate(
                rows,
                ["one step", "median s", "peak MiB", "weights MiB"],
                floatfmt=("", ".4f", ".0f", ".0f"),
                missingval="-",
            ),
            "",
            tabulate(
                compared,
                [f"ratio, {result['rounds']} rounds", "median", "95 % from", "to"],
                floatfmt=".3f",
            ),
        ]
    )
