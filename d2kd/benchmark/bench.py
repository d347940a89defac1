"""Time and memory of a distilled training step and of its parts.

Four rows are measured with the same detectors and batches: a training step of the student by Detectron2's trainer, the
same by d2kd's trainer, the teacher outputs that the losses read, and the distilled step. Without overhead the last
would be the sum of the second and the third.

The progress of all steps is 0.5, where losses that decay or start late are on. The learning rate is negligible.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.structures import Boxes
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig
from torch import nn

from ..config import is_distiller, load, with_defaults, without_priors, without_weights
from ..data import DownscaledStudentMapper
from ..engine.launch import pick_device
from ..engine.optimizer import build_optimizer
from ..engine.train_step import NonFiniteError, TrainStep, build_amp
from ..modeling import DetectorOutputs, Distiller, Teacher
from ..modeling.outputs import lazy_property
from ..utils.errors import InputError
from ..utils.memory import PeakMemory
from .phases import make_clock, measure_phases
from .untrained import measure_norm_statistics, random_batch

DETECTRON2 = "Detectron2's plain step"
STUDENT, TEACHER, DISTILLED = "student alone", "teacher outputs alone", "distilled"
BATCHES = 5  # for the statistics of norms, and for the rounds in turn
WARM_UPS = 3  # also the maximum number of image sizes, so that each one is warmed up
LEARNING_RATE = 1e-6
SEED = 0


@dataclass(frozen=True)
class BenchmarkCase:
    """What to measure.

    Args:
        label: name of the recipe in the results.
        config_file: a distilled recipe, see :func:`d2kd.config.load`.
        overrides: overrides of the recipe, such as ``model.losses.tar.weight=1.0``.
        image_sizes: (height, width) of the images in pixels, at most three; of the teacher's images if they are
            larger. All images of a batch have the same size; batches use the sizes in turn.
        batch_size: number of images per batch.
        device: default: the recipe's ``train.device``.

    Raises:
        InputError: an invalid size, or too many; in :meth:`recipe`: it cannot be loaded, or has no teacher.
    """

    label: str
    config_file: str
    overrides: tuple[str, ...] = ()
    image_sizes: tuple[tuple[int, int], ...] = ((320, 320),)
    batch_size: int = 2
    device: str | None = None

    def __post_init__(self):
        if not 1 <= len(self.image_sizes) <= WARM_UPS:
            raise InputError("image sizes", len(self.image_sizes), f"from 1 to {WARM_UPS}")
        smallest = min(min(size) for size in self.image_sizes)
        for culprit, value in (("image size", smallest), ("batch size", self.batch_size)):
            if value < 1:
                raise InputError(culprit, value, "at least 1")

    def recipe(self) -> DictConfig:
        """Load the recipe, and change it to need neither weights nor data."""
        config = with_defaults(load(self.config_file, self.overrides))
        if not is_distiller(config.model):
            raise InputError(
                self.config_file, "a plain recipe", "a distilled one, whose model is a Distiller"
            )
        config.model = without_weights(config.model)
        config.model.teacher.weights = None
        without_priors(config.model.losses)
        if self.device:
            config.train.device = self.device
        return config


@dataclass(frozen=True)
class BenchmarkRow:
    """A row of the benchmark.

    Attributes:
        step: runs one step, given the index of the batch.
        modules: the modules it uses.
        trained: model and optimizer of a training step.
    """

    step: Callable[[int], None]
    modules: tuple[nn.Module, ...]
    trained: tuple[nn.Module, torch.optim.Optimizer] | None = None

    @property
    def weights(self) -> int:
        """Size of parameters and buffers in bytes."""
        tensors = [t for m in self.modules for t in (*m.parameters(), *m.buffers())]
        return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True)
class TeacherReads:
    """The teacher outputs that are read in a step.

    Attributes:
        region_boxes, mask_boxes: of the student, in pixels of the teacher's images.
        read: names of the outputs that the losses read, in order.
    """

    region_boxes: list[list[Boxes]] | None
    mask_boxes: list[Boxes] | None
    read: tuple[str, ...]


class Bench:
    """The detectors, batches and rows of a recipe.

    Student and distilled step train the same student. The teacher's row computes the outputs that the losses read in a
    step on the same batch. Other work of a loss with the teacher's modules counts for the distilled step only.

    Attributes:
        device: device of the detectors.
        clock: returns the time in seconds after synchronizing the device.
        dataloader: node of the recipe.
        batches: five batches, generated from a fixed seed.
        teacher_reads: for each batch the teacher outputs that are read.
        losses: name -> distillation loss on the first batch.
        plain: key of the plain step; recipes with equal keys share its measurement.
        rows: name -> row. Rows hold all large objects, so deleting a row frees its memory.

    Raises:
        InputError: see :class:`BenchmarkCase`; or a loss is not finite.
    """

    def __init__(self, setup: BenchmarkCase):
        config = setup.recipe()
        self.dataloader, self._train = config.dataloader, config.train
        self.device = pick_device(config.train.device)
        # As in the trainer. Must be set before the first convolution, since cuDNN keeps the algorithm it selects.
        torch.backends.cudnn.benchmark = config.train.cudnn_benchmark
        self._sizes = setup.image_sizes, setup.batch_size
        self._precision = build_amp(config.train.amp, self.device)
        self.clock, self._number = make_clock(self.device), 0
        self._loader = iter(lambda: self.batches[self._number], None)  # repeats the current batch
        seed_all_rng(SEED)
        model = instantiate(config.model).to(self.device).train()
        student, teacher = model.student, model.teacher
        plain = [config.model.student, config.optimizer, config.train, self._sizes, teacher.scale]
        self.plain = repr(plain)
        self._start_iter = model.max_iter // 2
        self.batches = self._draw(student, teacher.scale)
        try:
            measure_norm_statistics(student, self.batches)
            # The teacher has its own batches, since its classes and image sizes may differ.
            drawn = self._draw(teacher.detector if teacher.has_predictions else student)
            batches = [_teacher_batch(teacher, batch) for batch in drawn]
            measure_norm_statistics(teacher.detector, batches)
            recorded = [self._record(model, batch) for batch in self.batches]
        except FloatingPointError as error:  # raised by Detectron2 for non-finite proposals
            expected = "untrained detectors with finite outputs"
            raise InputError(setup.config_file, error, expected) from error
        self.teacher_reads = [reads for reads, _ in recorded]
        self.losses = recorded[0][1]
        self.rows = {
            DETECTRON2: self._training(config, student, self._stock_trainer),
            STUDENT: self._training(config, student, self._d2kd_trainer),
            TEACHER: BenchmarkRow(self._teacher_step(teacher), (teacher.detector,)),
            DISTILLED: self._training(config, model, self._d2kd_trainer),
        }
        if config.train.amp.enabled and config.train.amp.dtype != "float16":
            del self.rows[DETECTRON2]  # Detectron2's trainer uses float16

    def _draw(self, detector: nn.Module, scale: float = 1) -> list[list[dict]]:
        sizes, count = self._sizes
        drawn = [
            random_batch(detector, sizes[i % len(sizes)], count, seed=SEED + i)
            for i in range(BATCHES)
        ]
        if scale == 1:
            return drawn
        downscaled = DownscaledStudentMapper(lambda sample: sample, scale)
        return [[downscaled(sample) for sample in batch] for batch in drawn]

    @contextlib.contextmanager
    def at_half_progress(self) -> Iterator[None]:
        """Set the progress to 0.5 and the random seed, so that all rows have the same random draws."""
        seed_all_rng(SEED)
        with EventStorage(start_iter=self._start_iter):
            yield

    def _record(self, model: Distiller, batch: list[dict]) -> tuple[TeacherReads, dict[str, float]]:
        """Run one distilled step; return the teacher outputs that its losses read, and the losses."""
        calls: list[DetectorOutputs] = []
        compute = model.teacher.outputs
        model.teacher.outputs = lambda *args, **kwargs: (
            calls.append(compute(*args, **kwargs)) or calls[-1]
        )
        try:
            with self.at_half_progress(), self._precision[0]():
                losses = model(batch)
        finally:
            del model.teacher.outputs
        (outputs,) = calls
        kind = type(outputs)
        read = tuple(n for n in vars(outputs) if isinstance(getattr(kind, n, None), lazy_property))
        losses = {k: v.item() for k, v in losses.items() if k.startswith("distill/")}
        return TeacherReads(outputs.region_boxes, outputs.mask_boxes, read), losses

    def _d2kd_trainer(self, config: DictConfig, model: nn.Module, optimizer: Any) -> SimpleTrainer:
        return TrainStep(model, self._loader, optimizer, self._precision, config.train)

    def _stock_trainer(self, config: DictConfig, model: nn.Module, optimizer: Any) -> SimpleTrainer:
        """Build the trainer of Detectron2's ``lazyconfig_train_net.py``."""
        if config.train.amp.enabled:
            return AMPTrainer(model, self._loader, optimizer, self._precision[1])
        return SimpleTrainer(model, self._loader, optimizer)

    def _training(self, config: DictConfig, model: nn.Module, trainer: Callable) -> BenchmarkRow:
        optimizer = build_optimizer(config, model)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE
        trainer = trainer(config, model, optimizer)
        trainer.iter = self._start_iter  # newer versions write it with the metrics

        def step(number: int) -> None:
            self._number = number
            try:
                trainer.run_step()
                if isinstance(trainer, TrainStep):  # as Detectron2's has read them
                    trainer.read_metrics()
            except NonFiniteError as error:
                raise InputError(error.culprit, error.value, "a finite number") from None

        kept = (model, model.teacher.detector) if isinstance(model, Distiller) else (model,)
        return BenchmarkRow(step, kept, (model, optimizer))

    def _teacher_step(self, teacher: Teacher) -> Callable[[int], None]:
        def step(number: int) -> None:
            reads = self.teacher_reads[number]
            with self._precision[0]():
                outputs = teacher.outputs(self.batches[number])
                # Scaled already.
                outputs.region_boxes, outputs.mask_boxes = reads.region_boxes, reads.mask_boxes
                for name in reads.read:
                    getattr(outputs, name)

        return step

    def seconds(self, name: str, number: int) -> float:
        """Measure the time of one step of a row on one of the batches."""
        with self.at_half_progress():
            start = self.clock()
            self.rows[name].step(number)
            return self.clock() - start

    def with_loader(self, name: str, batches: Iterable[list[dict]]) -> TrainStep:
        """Return the training step of a row with other batches than :attr:`batches`; run it in :meth:`at_half_progress`."""
        model, optimizer = self.rows[name].trained
        return TrainStep(model, batches, optimizer, self._precision, self._train)

    def phases(self, name: str, number: int) -> dict[str, float] | None:
        """Measure the phases of one step; None for a row that is not trained by d2kd's trainer."""
        if name not in (STUDENT, DISTILLED):
            return None
        with self.at_half_progress():
            return measure_phases(
                lambda: self.rows[name].step(number), name == DISTILLED, self.clock
            )

    def peak(self, name: str) -> int | None:
        """Delete the other rows, and measure the peak memory of steps on each image size.

        Returns:
            peak memory in bytes, including the row's weights; None if it is unknown.
        """
        row = self.rows[name]
        self.rows = {name: row}
        peak = PeakMemory(self.device)
        # The first step creates the optimizer's state, so its image size is repeated.
        for number in range(len(self._sizes[0]) + 1):
            self.seconds(name, number)
        if self.device.type == "cuda":
            return peak.bytes
        return None if peak.growth is None else row.weights + peak.growth


def _teacher_batch(teacher: Teacher, batch: list[dict]) -> list[dict]:
    """Convert a batch to the size and channel order of the teacher's images."""
    inputs = teacher.convert_inputs([{**x, "teacher_image": x["image"]} for x in batch])
    return [{**x, "image": y["image"]} for x, y in zip(batch, inputs, strict=True)]


def peak_memory(setup: BenchmarkCase, name: str) -> int | None:
    """Measure :meth:`Bench.peak` of a row in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak, setup, name).result()


def _peak(setup: BenchmarkCase, name: str) -> int | None:
    return Bench(setup).peak(name)
