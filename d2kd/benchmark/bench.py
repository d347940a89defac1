"""What distillation costs: seconds and memory of a training step, beside those of its parts.

Four rows are measured on the same detectors and batches: Detectron2's own plain step of the student, ours, what the
losses ask of the teacher and nothing else, and the distilled step. If listening were free, the last would be the sum
of the two before it.

All steps stand half-way through the run, where a loss that decays or begins late is on, with a learning rate too small
to move anything.
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
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig
from torch import nn

from ..config import is_distiller, load, with_defaults, without_priors, without_weights
from ..data import TwoScales
from ..engine.launch import pick_device
from ..engine.optimizer import build_optimizer
from ..engine.step import NotFinite, Step, precision
from ..modeling import DetectorOutputs, Distiller, Teacher
from ..modeling.outputs import asked
from ..utils.errors import InputError
from ..utils.memory import Peak
from .phases import clock, phases
from .untrained import draw_batch, measure_statistics

STOCK = "Detectron2's plain step"
STUDENT, TEACHER, DISTILLED = "student alone", "teacher's asked part alone", "distilled"
BATCHES = 5  # the norms' statistics come from them, and the rounds go round them
WARM_UPS = 3  # and as many sizes of images at most, so that each is warmed up
LEARNING_RATE = 1e-6
SEED = 0


@dataclass(frozen=True)
class Setup:
    """What is to be measured.

    Args:
        label: what it is called.
        config_file: a distilled recipe, see :func:`d2kd.config.load`.
        overrides: such as ``model.losses.tar.weight=1.0``.
        image_sizes: (height, width) of the images, in pixels; the teacher's where it sees larger ones. All images of
            a batch are of one size, the batches take them in turn.
        batch_size: images in a batch.
        device: instead of the recipe's ``train.device``.

    Raises:
        InputError: a size that is none, or more than three; by :meth:`recipe` what cannot be loaded, or has no teacher.
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
        """The recipe, made to need neither weights nor data."""
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
class Row:
    """Something to be measured.

    Attributes:
        step: a function of the batch's number.
        modules: what it keeps.
        trained: the model and the optimizer of a training step.
    """

    step: Callable[[int], None]
    modules: tuple[nn.Module, ...]
    trained: tuple[nn.Module, torch.optim.Optimizer] | None = None

    @property
    def weights(self) -> int:
        """Bytes of parameters and buffers."""
        tensors = [t for m in self.modules for t in (*m.parameters(), *m.buffers())]
        return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True)
class Question:
    """What was asked of a teacher in a step.

    Attributes:
        shared: what the student shared, in pixels of the teacher's images.
        read: what the losses read, in order.
    """

    shared: dict[str, Any]
    read: tuple[str, ...]


class Bench:
    """A recipe's detectors and batches, ready to be measured row by row.

    Student and distilled step train the same student. The teacher is asked what the losses read in a step
    on the same batch, as its outputs tell afterwards: work a loss does with the teacher's modules by itself counts
    for the distilled step alone.

    Attributes:
        device: where it runs.
        clock: seconds, after all that was asked of the device is done.
        dataloader: the recipe's.
        batches: five, drawn from a fixed seed.
        questions: for each batch, what is asked of the teacher.
        losses: of distillation, by name, for the first batch.
        plain: what the student's own step depends on, equal where it need not be measured again.
        rows: by name. They own all that is large, so a row that is taken out of here is freed.

    Raises:
        InputError: see :class:`Setup`; or a loss is not finite.
    """

    def __init__(self, setup: Setup):
        config = setup.recipe()
        self.dataloader, self._train = config.dataloader, config.train
        self.device = pick_device(config.train.device)
        # As the trainer does, and before the first convolution, for what that chooses is kept by the process.
        torch.backends.cudnn.benchmark = config.train.cudnn_benchmark
        self._shown = setup.image_sizes, setup.batch_size
        self._precision = precision(config.train.amp, self.device)
        self.clock, self._number = clock(self.device), 0
        self._feed = iter(lambda: self.batches[self._number], None)  # whatever the number is then
        seed_all_rng(SEED)
        model = instantiate(config.model).to(self.device).train()
        student, teacher = model.student, model.teacher
        plain = [config.model.student, config.optimizer, config.train, self._shown, teacher.scale]
        self.plain = repr(plain)
        self._start_iter = model.max_iter // 2
        self.batches = self._draw(student, teacher.scale)
        try:
            measure_statistics(student, self.batches)
            # With objects of its own: it may know other classes, and be shown larger images.
            theirs = [_in_full(teacher, batch) for batch in self._draw(teacher.detector)]
            measure_statistics(teacher.detector, theirs)
            heard = [self._listen(model, batch) for batch in self.batches]
        except FloatingPointError as error:  # Detectron2's, of proposals
            raise InputError(
                setup.config_file, error, "untrained detectors that their norms keep finite"
            ) from error
        self.questions = [question for question, _ in heard]
        self.losses = heard[0][1]
        self.rows = {
            STOCK: self._training(config, student, self._stock),
            STUDENT: self._training(config, student, self._ours),
            TEACHER: Row(self._asking(teacher), (teacher.detector,)),
            DISTILLED: self._training(config, model, self._ours),
        }
        if config.train.amp.enabled and config.train.amp.dtype != "float16":
            del self.rows[STOCK]  # Detectron2 knows no other

    def _draw(self, detector: nn.Module, scale: int = 1) -> list[list[dict]]:
        sizes, count = self._shown
        drawn = [
            draw_batch(detector, sizes[i % len(sizes)], count, seed=SEED + i)
            for i in range(BATCHES)
        ]
        if scale == 1:
            return drawn
        reduced = TwoScales(lambda sample: sample, scale)
        return [[reduced(sample) for sample in batch] for batch in drawn]

    @contextlib.contextmanager
    def half_way(self) -> Iterator[None]:
        """Half-way through the run, with random draws that are the same for every row."""
        seed_all_rng(SEED)
        with EventStorage(start_iter=self._start_iter):
            yield

    def _listen(self, model: Distiller, batch: list[dict]) -> tuple[Question, dict[str, float]]:
        heard: list[DetectorOutputs] = []
        ask = model.teacher.ask
        model.teacher.ask = lambda *args, **kwargs: heard.append(ask(*args, **kwargs)) or heard[-1]
        try:
            with self.half_way(), self._precision[0]():
                losses = model(batch)
        finally:
            del model.teacher.ask
        (outputs,) = heard
        kind = type(outputs)
        known = [name for name in vars(outputs) if hasattr(kind, name)]
        read = tuple(name for name in known if isinstance(getattr(kind, name), asked))
        question = Question({name: vars(outputs)[name] for name in known if name not in read}, read)
        return question, {k: v.item() for k, v in losses.items() if k.startswith("distill/")}

    def _ours(self, config: DictConfig, model: nn.Module, optimizer: Any) -> SimpleTrainer:
        return Step(model, self._feed, optimizer, self._precision, config.train)

    def _stock(self, config: DictConfig, model: nn.Module, optimizer: Any) -> SimpleTrainer:
        """As Detectron2's ``lazyconfig_train_net.py`` trains it."""
        if config.train.amp.enabled:
            return AMPTrainer(model, self._feed, optimizer, self._precision[1])
        return SimpleTrainer(model, self._feed, optimizer)

    def _training(self, config: DictConfig, model: nn.Module, trainer: Callable) -> Row:
        optimizer = build_optimizer(config, model)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE
        trainer = trainer(config, model, optimizer)
        trainer.iter = self._start_iter  # which newer versions write beside metrics

        def step(number: int) -> None:
            self._number = number
            try:
                trainer.run_step()
            except NotFinite as error:
                raise InputError(error.culprit, error.value, "a finite number") from None

        kept = (model, model.teacher.detector) if isinstance(model, Distiller) else (model,)
        return Row(step, kept, (model, optimizer))

    def _asking(self, teacher: Teacher) -> Callable[[int], None]:
        def step(number: int) -> None:
            question = self.questions[number]
            with self._precision[0]():
                outputs = teacher.ask(self.batches[number])
                vars(outputs).update(question.shared)  # share() would scale the boxes once more
                for name in question.read:
                    getattr(outputs, name)

        return step

    def seconds(self, name: str, number: int) -> float:
        """Seconds of one step of a row on one of the batches."""
        with self.half_way():
            start = self.clock()
            self.rows[name].step(number)
            return self.clock() - start

    def fed(self, name: str, batches: Iterable[list[dict]]) -> Step:
        """Our training step of a row, to be run :meth:`half_way`, on other batches than :attr:`batches`."""
        model, optimizer = self.rows[name].trained
        return Step(model, batches, optimizer, self._precision, self._train)

    def phases(self, name: str, number: int) -> dict[str, float] | None:
        """Where the time of one of our training steps goes; None for the other rows."""
        if name not in (STUDENT, DISTILLED):
            return None
        with self.half_way():
            return phases(lambda: self.rows[name].step(number), name == DISTILLED, self.clock)

    def peak(self, name: str) -> int | None:
        """Let go of the other rows, and take a step of this one on each size of images, and one more.

        Returns:
            bytes at the peak, the row's weights included, or None where the system does not tell.
        """
        row = self.rows[name]
        self.rows = {name: row}
        peak = Peak(self.device)
        # The optimizer's state is there after the first step, whose size so comes once more.
        for number in range(len(self._shown[0]) + 1):
            self.seconds(name, number)
        if self.device.type == "cuda":
            return peak.bytes
        return None if peak.growth is None else row.weights + peak.growth


def _in_full(teacher: Teacher, batch: list[dict]) -> list[dict]:
    """A batch at the size and in the channel order of the teacher's images, with its objects."""
    own = teacher.own_inputs([{**x, "teacher_image": x["image"]} for x in batch])
    return [{**x, "image": y["image"]} for x, y in zip(batch, own, strict=True)]


def peak_memory(setup: Setup, name: str) -> int | None:
    """:meth:`Bench.peak` of a row, in a fresh process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak, setup, name).result()


def _peak(setup: Setup, name: str) -> int | None:
    return Bench(setup).peak(name)
