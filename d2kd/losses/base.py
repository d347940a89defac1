"""The base class of distillation losses, and the named sum of several."""

from __future__ import annotations

import math
import secrets
from numbers import Real
from typing import Any

import numpy as np
import torch
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from fvcore.common.param_scheduler import ParamScheduler
from torch import Tensor, nn

from ..modeling.outputs import OutputNotAvailable
from ..structures.class_map import ClassMap
from ..utils.comm import reduce_mean
from ..utils.errors import InputError

Weight = float | ParamScheduler
"""A coefficient: a number, or an fvcore schedule of the training progress in [0, 1]."""

_END = math.nextafter(1.0, 0.0)


def get_weight(weight: Weight, progress: float) -> float:
    """Return the value of a coefficient at ``progress = iteration / max_iter``.

    fvcore's schedules are defined below 1. A run continued past its end keeps the last value.
    """
    if isinstance(weight, ParamScheduler):
        return float(weight(min(max(progress, 0.0), _END)))
    return float(weight)


class EpochDecay(ParamScheduler):
    """``r(e) = 1 - (e - 1) / E`` in epoch e = 1 … E: 1 in the first, 1/E in the last.

    The per-epoch form of distillation decay (TAR, arXiv 2006.13108, as described by later papers).
    ``LinearParamScheduler(1.0, 0.0)`` is its smooth equivalent.
    """

    def __init__(self, epochs: int):
        if epochs < 1:
            raise InputError("epochs", epochs, "at least 1")
        self.epochs = epochs

    def __call__(self, where: float) -> float:
        epoch = min(int(where * self.epochs), self.epochs - 1)
        return 1.0 - epoch / self.epochs


class DistillLoss(nn.Module):
    """Base class of losses between the outputs of a student and a teacher.

    Subclasses implement ``forward(student, teacher)`` and return a scalar, or a dict of named scalars. The teacher
    computes only the outputs that are read. Adapters and decoders are ordinary submodules. They are created in the
    constructor or, where they depend on the detectors, in :meth:`setup`.

    Args:
        weight: coefficient of the loss, a number or a schedule.
        across_processes: if True, sums are divided by counts over all processes, so the result does not depend on
            how a batch is split. If False, each process uses its own counts, as published code does.
    """

    taps: tuple[str, ...] = ()
    """Names of additional student modules to record; the outputs of a module's calls are ``student.taps[name]``."""

    teacher_taps: tuple[str, ...] = ()
    """Names of teacher modules to record; ``teacher.taps[name]`` computes the part of the teacher that has the module."""

    milestones: tuple[float, ...] = ()
    """Fractions of the run at which the amount of computation changes, other than by a weight of 0."""

    needs_ground_truth: bool = True
    """Whether the loss reads objects or labels, and cannot have unlabelled images. Reading them there raises an error."""

    class_map: ClassMap | None = None
    """The classes that both detectors have. None if their class lists are equal. Set before :meth:`setup`."""

    scale: float = 1
    """Size of the teacher's images relative to the student's. Set before :meth:`setup`."""

    def __init__(self, *, weight: Weight = 1.0, across_processes: bool = True):
        super().__init__()
        self.weight = weight
        self.across_processes = across_processes
        self.progress = 0.0

    def setup(self, student: nn.Module, teacher: nn.Module) -> None:
        """Create what depends on the detectors. Called once, before the optimizer is built.

        Raises:
            InputError: if this loss cannot compare these detectors.
        """

    def forward(self, student, teacher) -> Tensor | dict[str, Tensor]:
        raise NotImplementedError

    def normalizer(self, *counts: Tensor, min_total: float = 1.0) -> Tensor:
        """Return a divisor for each count of this process.

        If ``across_processes``, it is the total over processes, at least ``min_total``, divided by their number. This is a
        collective operation: every process must make the same calls, whatever its batch. Otherwise it is
        ``max(count, min_total)``.
        """
        stacked = torch.stack([count.detach().float() for count in counts])
        if self.across_processes:
            return reduce_mean(stacked, min_total)
        return stacked.clamp(min=min_total)


class SeededLoss(DistillLoss):
    """Base class of losses with random numbers of their own, which leave the global generators alone.

    A run with such a loss thus draws the same images, augmentations and regions as one without. The state dict has one
    number for all processes, so a resumed run continues the sequence of each process.

    Args:
        seed: seed of the generator. Negative: a random seed, as with ``train.seed``.
        options: arguments of :class:`DistillLoss`.
    """

    def __init__(self, *, seed: int = 0, **options: Any):
        super().__init__(**options)
        self.seed = seed if seed >= 0 else secrets.randbits(31)
        self.num_forwards = 0  # with this seed

    def generator(self) -> torch.Generator:
        """Return the generator of this step, on the CPU. It depends on the seed, the process and the number of calls."""
        key = (self.seed, comm.get_rank(), self.num_forwards)
        self.num_forwards += 1
        (word,) = np.random.SeedSequence(key).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(word) >> 1)

    # Not buffers, whose reading would synchronize with the GPU in each step.
    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.num_forwards, self.seed])

    def set_extra_state(self, state: Tensor) -> None:
        self.num_forwards, self.seed = (int(number) for number in state)


class DistillLosses(nn.Module):
    """A container of named distillation losses.

    Terms are returned as ``distill/loss_<name>`` or ``distill/loss_<name>_<term>``. The prefix avoids a clash with
    the student's losses. Detectron2 prints every scalar that has "loss" in its name.

    Example:
        >>> from d2kd.losses import DistillLosses, ImitationLoss
        >>> from d2kd.modeling import Distiller, Teacher
        >>> from d2kd.testing import batch, build, forward_losses, tiny_retinanet
        >>> student, teacher = build(tiny_retinanet()), Teacher(build(tiny_retinanet(), seed=1), weights=None)
        >>> losses = DistillLosses(imitation=ImitationLoss())
        >>> model = Distiller(student=student, teacher=teacher, losses=losses, max_iter=2).train()
        >>> list(forward_losses(model, batch()))
        ['loss_cls', 'loss_box_reg', 'distill/loss_imitation']
    """

    def __init__(self, **losses: DistillLoss):
        super().__init__()
        for name, loss in losses.items():
            if not isinstance(loss, DistillLoss):
                raise InputError(f"losses.{name}", type(loss).__name__, "a DistillLoss")
        self.by_name = nn.ModuleDict(losses)

    @property
    def taps(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(tap for loss in self.by_name.values() for tap in loss.taps))

    @property
    def teacher_taps(self) -> tuple[str, ...]:
        taps = (tap for loss in self.by_name.values() for tap in loss.teacher_taps)
        return tuple(dict.fromkeys(taps))

    def setup(
        self,
        student: nn.Module,
        teacher: nn.Module,
        class_map: ClassMap | None = None,
        scale: float = 1,
    ) -> None:
        """Set ``class_map`` and ``scale`` of every loss, then call its :meth:`DistillLoss.setup`.

        Raises:
            InputError: a weight is negative, or a loss cannot compare these detectors.
        """
        for name, loss in self.by_name.items():
            loss.class_map, loss.scale = class_map, scale
            try:
                _check_weights(loss)
                loss.setup(student, teacher)
            except InputError as error:
                raise InputError(
                    f"losses.{name}.{error.culprit}", error.found, error.expected
                ) from error

    def check_unlabelled(self) -> None:
        """Check that all losses can have unlabelled images, whose batches have ``student.is_labelled`` False.

        Raises:
            InputError: naming one whose weight is not 0 and which needs ground truth.
        """
        for name, loss in self.by_name.items():
            if loss.needs_ground_truth and not is_zero(loss.weight):
                found = f"{type(loss).__name__}, which needs ground truth, and unlabelled images"
                raise InputError(f"losses.{name}", found, "a loss that needs none, or labels")

    def is_active(self, progress: float) -> bool:
        """Return whether any loss has a weight other than 0."""
        return any(get_weight(loss.weight, progress) != 0 for loss in self.by_name.values())

    def forward(self, student, teacher, *, progress: float = 0.0) -> dict[str, Tensor]:
        """Return the weighted terms by key. A loss with weight 0 is not called, so it reads nothing of the teacher."""
        terms: dict[str, Tensor] = {}
        storage = get_event_storage()
        for name, loss in self.by_name.items():
            weight = get_weight(loss.weight, progress)
            storage.put_scalar(f"distill/weight_{name}", weight, smoothing_hint=False)
            key = f"distill/loss_{name}"
            if weight != 0.0:
                loss.progress = progress
                try:
                    value = loss(student, teacher)
                except OutputNotAvailable as error:
                    raise InputError(
                        f"losses.{name}", error, "outputs that both detectors have"
                    ) from error
                named = value if isinstance(value, dict) else {"": value}
                for term, scalar in named.items():
                    full = f"{key}_{term}" if term else key
                    if full in terms:
                        raise InputError(f"losses.{name}", f"a second {full}", "a name of its own")
                    terms[full] = scalar * weight
            # Parameters stay in the graph at weight 0, also when only their term has that weight: DDP raises an error
            # if one gets no gradient. The zero is of no value, since 0 * NaN would be NaN.
            carrier = next((k for k in terms if k == key or k.startswith(f"{key}_")), key)
            _keep_in_graph(loss, terms, carrier)
        if not student.is_labelled:  # no loss of the student's own has all its parameters
            _keep_in_graph(student.detector, terms, next(iter(terms), "distill/loss"))
        return terms


def _keep_in_graph(module: nn.Module, terms: dict[str, Tensor], key: str) -> None:
    """Add a zero of a module's parameters, if it has any, to the term of this key."""
    if parameters := [p for p in module.parameters() if p.requires_grad]:
        zero = _Zero.apply(*parameters)
        terms[key] = terms[key] + zero if key in terms else zero


def _check_weights(loss: DistillLoss) -> None:
    """Check the attributes of a loss whose names end with "weight"; a negative one would teach the opposite."""
    for part in (x for x in loss.modules() if isinstance(x, DistillLoss)):
        for name, value in vars(part).items():
            if name.endswith("weight") and isinstance(value, Real) and not value >= 0:
                raise InputError(name, value, "a number of at least 0")


class _Zero(torch.autograd.Function):
    """A zero that keeps parameters in the graph: their gradient is 0. It reads no parameter and needs no memory."""

    @staticmethod
    def forward(ctx, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(p.new_zeros(()).expand_as(p) for p in ctx.parameters)


def is_zero(weight: Weight) -> bool:
    """Return whether a coefficient is 0 throughout, so its term needs no modules."""
    return not isinstance(weight, ParamScheduler) and (weight == 0 or math.isnan(weight))
