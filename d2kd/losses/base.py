"""What a distillation loss is, and the named sum of several."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from detectron2.utils.events import get_event_storage
from fvcore.common.param_scheduler import ParamScheduler
from torch import Tensor, nn

from ..modeling.outputs import Unreadable
from ..structures.class_map import ClassMap
from ..utils.comm import over_processes
from ..utils.errors import InputError

Weight = float | ParamScheduler
"""A coefficient: a number, or an fvcore schedule of the progress in [0, 1]."""


_END = math.nextafter(1.0, 0.0)


def value_of(weight: Weight, progress: float) -> float:
    """A coefficient's value at ``progress = iteration / max_iter``.

    fvcore's schedules are defined before 1; a run that is continued past its end stays at the end.
    """
    if isinstance(weight, ParamScheduler):
        return float(weight(min(max(progress, 0.0), _END)))
    return float(weight)


class EpochDecay(ParamScheduler):
    """``r(e) = 1 - (e - 1) / E`` in epoch e = 1 … E: 1 in the first, 1/E in the last.

    The per-epoch form of distillation decay (TAR, arXiv 2006.13108; the form is the one others ascribe to
    it). ``LinearParamScheduler(1.0, 0.0)`` is its smooth equivalent.
    """

    def __init__(self, epochs: int):
        if epochs < 1:
            raise InputError("epochs", epochs, "at least 1")
        self.epochs = epochs

    def __call__(self, where: float) -> float:
        epoch = min(int(where * self.epochs), self.epochs - 1)
        return 1.0 - epoch / self.epochs


class DistillLoss(nn.Module):
    """A loss between what a student and a teacher say.

    Subclasses implement ``forward(student, teacher)`` and return a scalar, or a dict of named scalars.
    What they read of ``teacher`` is what the teacher computes. Adapters and decoders are ordinary
    submodules, made in the constructor or, where they depend on the detectors, in :meth:`bind`.

    Args:
        weight: coefficient, a number or a schedule of the progress.
        across_processes: whether sums are divided by counts of all processes, so that it does not matter how a
            batch is dealt to them; False: each by its own counts, as published code does.
    """

    taps: tuple[str, ...] = ()
    """Names of further student modules to listen to, found as ``student.taps[name]``."""

    term_weights: Mapping[str, str] = {}
    """By term the argument that multiplies it alone, where that is not called ``<term>_weight``."""

    changes: tuple[float, ...] = ()
    """Fractions of the run at which it begins to compute more or less, other than by a weight of 0."""

    class_map: ClassMap | None = None
    """Which classes both detectors know; None: their lists are the same. Set before :meth:`bind`."""

    scale = 1
    """How many times larger the teacher's images are than the student's. Set before :meth:`bind`."""

    def __init__(self, *, weight: Weight = 1.0, across_processes: bool = True):
        super().__init__()
        self.weight = weight
        self.across_processes = across_processes
        self.progress = 0.0

    def bind(self, student: nn.Module, teacher: nn.Module) -> None:
        """See both detectors once, before the optimizer is built.

        Raises:
            InputError: these detectors cannot be compared by this loss.
        """

    def forward(self, student, teacher) -> Tensor | dict[str, Tensor]:
        raise NotImplementedError

    def normalizer(self, *counts: Tensor, least: float = 1.0) -> Tensor:
        """What to divide sums by, given how many things this process has: at least ``least`` of each.

        Collective where ``across_processes``, so what calls it must not depend on a process's batch.

        Returns:
            one for each of the counts.
        """
        stacked = torch.stack([count.detach().float() for count in counts])
        if self.across_processes:
            return over_processes(stacked, least)
        return stacked.clamp(min=least)


class DistillLosses(nn.Module):
    """The named sum of distillation losses.

    Terms are returned as ``distill/loss_<name>`` or ``distill/loss_<name>_<term>``: the prefix keeps a loss
    from overwriting one of the student's own, the word "loss" makes Detectron2 print it.
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

    def bind(
        self,
        student: nn.Module,
        teacher: nn.Module,
        class_map: ClassMap | None = None,
        scale: int = 1,
    ) -> None:
        """Show both detectors to every loss, which classes they share if their lists differ, and the scale."""
        for name, loss in self.by_name.items():
            loss.class_map, loss.scale = class_map, scale
            try:
                loss.bind(student, teacher)
            except InputError as error:
                raise InputError(
                    f"losses.{name}.{error.culprit}", error.found, error.expected
                ) from error

    def forward(self, student, teacher, *, progress: float = 0.0) -> dict[str, Tensor]:
        """Weighted terms by key; a loss whose weight is 0 is not called, and asks the teacher nothing."""
        terms: dict[str, Tensor] = {}
        storage = get_event_storage()
        for name, loss in self.by_name.items():
            weight = value_of(loss.weight, progress)
            storage.put_scalar(f"distill/weight_{name}", weight, smoothing_hint=False)
            key = f"distill/loss_{name}"
            if weight != 0.0:
                loss.progress = progress
                try:
                    value = loss(student, teacher)
                except Unreadable as error:
                    raise InputError(f"losses.{name}", error, "what both detectors say") from error
                named = value if isinstance(value, dict) else {"": value}
                for term, scalar in named.items():
                    full = f"{key}_{term}" if term else key
                    if full in terms:
                        raise InputError(f"losses.{name}", f"a second {full}", "a name of its own")
                    terms[full] = scalar * weight
            # Parameters stay in the graph at weight 0, and where a term of theirs is switched off: DDP
            # refuses those that vanish. Of parameters alone, since 0 * NaN would be NaN.
            if idle := silent_sum(loss.parameters()):
                carrier = next((k for k in terms if k == key or k.startswith(f"{key}_")), key)
                terms[carrier] = terms[carrier] + idle[0] if carrier in terms else idle[0]
        return terms


def silent_sum(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """A zero that holds the parameters in the graph, in a list; empty without parameters."""
    zeros = [(p * 0).sum() for p in parameters if p.requires_grad]
    return [torch.stack(zeros).sum()] if zeros else []


def is_off(weight: Weight) -> bool:
    """Whether a coefficient is 0 throughout, so that its term needs nothing built."""
    return not isinstance(weight, ParamScheduler) and (weight == 0 or math.isnan(weight))


def check_anchors(
    student: nn.Module, teacher: nn.Module, scale: int = 1, expected: str = "the same anchors"
) -> None:
    """Raise InputError unless two dense detectors have equal anchors on equal grids, to be compared row by row."""
    if scale != 1:
        raise InputError("anchors", f"a teacher of images {scale} times larger", expected)
    kinds = [type(d).__name__ for d in (student, teacher)]
    if not all(hasattr(d, "anchor_generator") for d in (student, teacher)):
        raise InputError("anchors", f"student {kinds[0]}, teacher {kinds[1]}", expected)
    ours, theirs = (
        (
            [d.backbone.output_shape()[level].stride for level in d.head_in_features],
            [cell.tolist() for cell in d.anchor_generator.cell_anchors],
            d.backbone.size_divisibility,
            list(getattr(d.anchor_generator, "strides", ())),
            getattr(d.anchor_generator, "offset", None),
        )
        for d in (student, teacher)
    )
    compared = "strides", "anchors of a cell", "padding", "strides of anchors", "offset of anchors"
    for what, a, b in zip(compared, ours, theirs, strict=True):
        if a != b:
            if what == "anchors of a cell":
                a, b = ([len(cell) for cell in side] for side in (a, b))
                what = "anchors of a cell" if a != b else "sizes of anchors"
                a, b = (a, b) if a != b else ("one set", "another")
            raise InputError("anchors", f"{what}: student {a}, teacher {b}", expected)
