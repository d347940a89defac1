"""Extreme and odd inputs for everything the losses compute: value and gradient stay finite.

    python -m tests.fuzz --examples 500

looks at so many examples of each function and each loss, and prints a closing line with counts; exit code 1 if
one was not finite. Values are 0, ±1, ±80, a constant or mixtures of these; shapes go down to nothing and to one
element; precision is float32, or float16 or bfloat16 inside autocast.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from d2kd.layers.focal_losses import distribution_focal_loss, quality_focal_loss
from d2kd.losses.erd import elastic_selection
from d2kd.losses.functional import masked_squared_error, sigmoid_divergence, softmax_kl
from d2kd.losses.icd import identification_loss, localization_loss, value_distance
from d2kd.losses.tar import classification_term, dense_classification_term, regression_term
from d2kd.modeling.box_regression import integral

from .recorded import LOSSES, Recorded
from .resume_runs import quiet

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
VALUES = (0.0, 1.0, -1.0, 80.0, -80.0, 1e-3)


class Draw:
    """Tensors of one example, all chosen from hypothesis's `data`."""

    def __init__(self, data):
        self._data = data
        self.dtype = self.one_of(DTYPES)
        self.generator = torch.Generator().manual_seed(self.number(0, 2**20))
        self.leaves: list[Tensor] = []

    def one_of(self, choices):
        return self._data.draw(st.sampled_from(choices))

    def number(self, low: int, high: int) -> int:
        return self._data.draw(st.integers(low, high))

    def size(self, least: int = 0) -> int:
        return self.number(least, 4)

    def like(self, value: Tensor) -> Tensor:
        """Other values in its place: of a few extremes, or also noise."""
        some = self._data.draw(st.lists(st.sampled_from(VALUES), min_size=1, max_size=3))
        index = torch.randint(len(some), value.shape, generator=self.generator)
        drawn = torch.tensor(some)[index]
        if self.one_of((False, True)):
            drawn = drawn + torch.randn(value.shape, generator=self.generator)
        return drawn.to(self.dtype)

    def answer(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An output of a student, of which a gradient is wanted."""
        drawn = self.like(torch.empty(shape)).to(dtype or self.dtype)
        self.leaves.append(drawn.requires_grad_())
        return self.leaves[-1]

    def constant(self, *shape: int) -> Tensor:
        return self.like(torch.empty(shape))

    def share(self, *shape: int) -> Tensor:
        """In [0, 1], the ends included."""
        return torch.randint(0, 3, shape, generator=self.generator) / 2

    def labels(self, count: int, low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (count,), generator=self.generator)

    def flags(self, *shape: int) -> Tensor:
        return torch.randint(0, 2, shape, generator=self.generator).bool()


def _logits_of_rows(draw: Draw) -> Tensor:
    r, k = draw.size(), draw.size(1)
    return softmax_kl(draw.answer(r, k), draw.constant(r, k), draw.one_of((1.0, 10.0))).sum()


def _sigmoids(draw: Draw) -> Tensor:
    shape = draw.size(), draw.size()
    return sigmoid_divergence(draw.answer(*shape), draw.constant(*shape))[0].sum()


def _maps(draw: Draw) -> Tensor:
    n, *shape = (draw.size() for _ in range(4))
    maps = draw.answer(n, *shape), draw.constant(n, *shape)
    return masked_squared_error(*maps, draw.share(n, *shape[1:]))


def _classification(draw: Draw) -> Tensor:
    r, k = draw.size(), draw.size(1)
    logits = draw.answer(r, k + 1), draw.constant(r, k + 1)
    return classification_term(*logits, draw.labels(r, -1, k), temperature=2.0)


def _dense_classification(draw: Draw) -> Tensor:
    r, k = draw.size(), draw.size(1)
    logits = draw.answer(r, k), draw.constant(r, k)
    return dense_classification_term(*logits, draw.labels(r, -1, k), background_weight=0.5)


def _regression(draw: Draw) -> Tensor:
    p = draw.size()
    return regression_term(draw.answer(p, 4), draw.constant(p, 4), draw.flags(p))


def _selection(draw: Draw) -> Tensor:
    chosen = elastic_selection(draw.constant(draw.size(), draw.size(1)), 2.0)
    assert chosen.dtype == torch.bool
    return chosen.float().sum()


def _identification(draw: Draw) -> Tensor:
    n, k = draw.size(), draw.size()
    used = draw.flags(n, k)
    return identification_loss(draw.answer(n, k), used & draw.flags(n, k), used)


def _localization(draw: Draw) -> Tensor:
    n, k = draw.size(), draw.size()
    # A decoder answers in float32 whatever the autocast; a box without a side makes its gradients large.
    answers = draw.answer(n, k, 4, dtype=torch.float32)
    return localization_loss(answers, draw.share(n, k, 4), draw.flags(n, k))


def _values(draw: Draw) -> Tensor:
    shape = draw.size(1), draw.size(1), draw.size(), draw.size(1)
    values, share = (draw.answer(*shape), draw.constant(*shape)), draw.share(*shape[:3])
    return value_distance(*values, share, draw.one_of(("image", "instance")))


def _quality(draw: Draw) -> Tensor:
    shape = draw.size(), draw.size()
    return quality_focal_loss(draw.answer(*shape).float(), draw.share(*shape)).sum()


def _distribution(draw: Draw) -> Tensor:
    r, n = draw.size(), draw.size(2)
    logits = draw.answer(r, n)
    distances = draw.constant(r).float()
    return distribution_focal_loss(logits, distances).sum() + integral(logits.float()).sum()


FUNCTIONS: dict[str, Callable[[Draw], Tensor]] = {
    "softmax_kl": _logits_of_rows,
    "sigmoid_divergence": _sigmoids,
    "masked_squared_error": _maps,
    "classification_term": _classification,
    "dense_classification_term": _dense_classification,
    "regression_term": _regression,
    "elastic_selection": _selection,
    "identification_loss": _identification,
    "localization_loss": _localization,
    "value_distance": _values,
    "quality_focal_loss": _quality,
    "distribution_focal_loss": _distribution,
}


def check_function(name: str, data) -> None:
    """One example of a function: value and gradients are finite, and there is no warning of a doubtful number."""
    draw = Draw(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.autocast("cpu", _half(draw.dtype), draw.dtype != torch.float32):
            value = FUNCTIONS[name](draw)
        _finite(name, value)
        if value.requires_grad:
            value.backward()
    for leaf in draw.leaves:
        if leaf.grad is not None:
            _finite(f"{name}'s gradient", leaf.grad)


_RECORDED: dict[str, Recorded] = {}


def check_whole_loss(name: str, data) -> None:
    """One example of a loss on a batch whose every answer was replaced."""
    if name not in _RECORDED:
        _RECORDED[name] = Recorded(name)
    draw = Draw(data)
    images = draw.one_of(([0], [2], [0, 2], [2, 3], [0, 1, 2, 3]))
    some = draw.one_of((None, 0, 1))
    total, gradients = _RECORDED[name].loss(images, draw.like, some, draw.dtype)
    _finite(name, total)
    for key, gradient in gradients.items():
        _finite(f"{name}'s gradient of {key}", gradient)


def _half(dtype: torch.dtype) -> torch.dtype | None:
    return None if dtype == torch.float32 else dtype


def _finite(what: str, value: Tensor) -> None:
    assert value.isfinite().all(), f"{what} is not finite"


CHECKS: dict[str, Callable] = {
    **{name: lambda data, name=name: check_function(name, data) for name in FUNCTIONS},
    **{f"loss {name}": lambda data, name=name: check_whole_loss(name, data) for name in LOSSES},
}
"""Functions of hypothesis's ``data()`` that raise an AssertionError, by what they check."""


def fuzz(name: str, examples: int, repeatable: bool = True) -> int:
    """Look at examples of one check; how many there were.

    Raises:
        AssertionError: one was not finite; hypothesis adds the smallest such example.
    """
    seen = [0]

    def look(data) -> None:
        seen[0] += 1
        CHECKS[name](data)

    options = dict(database=None, deadline=None, report_multiple_bugs=False)
    options |= dict(max_examples=examples, suppress_health_check=list(HealthCheck))
    settings(derandomize=repeatable, **options)(given(st.data())(look))()
    return seen[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=500, help="of each function and loss")
    parser.add_argument("--random", action="store_true", help="others than the last time")
    args = parser.parse_args()
    quiet()
    seen, faults = 0, 0
    for name in CHECKS:
        try:
            count = fuzz(name, args.examples, not args.random)
            seen += count
            print(f"{name:32} {count} examples, all finite", flush=True)
        except AssertionError as error:
            faults += 1
            print(f"{name:32} {error}", flush=True)
    of = f"{len(FUNCTIONS)} functions and {len(LOSSES)} losses in {len(DTYPES)} precisions"
    print(f"{seen} examples of {of}: {faults} not finite")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
