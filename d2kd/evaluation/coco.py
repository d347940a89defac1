"""What a detector that learned in steps reached on the classes of earlier steps, of the last, and of all."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

PerClass = Mapping[str, float | None]
"""AP in 0..100 by class, as ``COCOEvaluator`` tells it; None where the data has no such object."""


def old_new_all(
    per_class: PerClass, steps: Sequence[Sequence[str]], step: int
) -> dict[str, float | None]:
    """``old``, ``new`` and ``all``: the mean AP of the classes before a step, of that step, and of both.

    Args:
        per_class: of a detector that has learned up to ``step``.
        steps: the classes of each step.
        step: from 1, where nothing is old.

    Returns:
        means over the classes with an AP; None where there is none.
    """
    old, new = list(chain(*steps[: step - 1])), list(steps[step - 1])
    return {
        name: mean_ap(per_class, of)
        for name, of in (("old", old), ("new", new), ("all", old + new))
    }


def mean_ap(per_class: PerClass, classes: Iterable[str]) -> float | None:
    """The mean over classes, of those that have an AP."""
    values = [per_class[name] for name in classes if per_class.get(name) is not None]
    return statistics.fmean(values) if values else None


def forgetting(
    before: PerClass, after: PerClass, classes: Iterable[str]
) -> dict[str, float | None]:
    """For each class the AP it has lost: what it was when it was learned, minus what it is now."""
    lost = {}
    for name in classes:
        was, now = before.get(name), after.get(name)
        lost[name] = None if was is None or now is None else was - now
    return lost


def gaps(reached: float | None, upper_bound: float | None) -> tuple[float | None, float | None]:
    """AbsGap and RelGap: how far an AP is below that of training on everything, in points and as a fraction."""
    if reached is None or not upper_bound:
        return None, None
    return upper_bound - reached, (upper_bound - reached) / upper_bound
