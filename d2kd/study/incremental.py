"""Metrics of class-incremental studies: AP of old, new and all classes, forgetting, and the gap to the upper bound."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from ..utils.io import write_json
from .plan import Study
from .text import format_mean, format_text_table

FILE = "increments.json"
"""File of these metrics in a study's folder."""


def increment_metrics(study: Study, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a dict of metrics for each run with an increment, and for each run of the upper bound.

    ``forgetting`` is, for each class of an earlier increment, its AP after the increment that learned it minus its AP now. Both
    are measured on the test images of their own increment. The gaps to the upper bound of the same seed are computed only
    after the last increment, since the upper bound is not evaluated on the images of other increments.
    """
    found = {(row["method"], row["seed"]): row for row in rows}
    once = {
        row["method"]: row for row in rows if study.runs[row["method"]].get("shared_across_seeds")
    }

    def row_of(method: str | None, seed: int) -> Mapping[str, Any] | None:
        return once.get(method) or found.get((method, seed))

    after = []
    for row in rows:
        increment = study.increment_of(row["method"])
        if increment is None and row["method"] != study.upper_bound:
            continue
        here = increment or len(study.increments)
        bound = row_of(study.upper_bound, row["seed"])
        bound_ap = bound and mean_ap(bound["per_class"], chain(*study.increments))
        entry = {key: row[key] for key in ("name", "method", "seed")} | {"increment": here}
        entry |= mean_ap_old_new_all(row["per_class"], study.increments, here)
        lost: dict[str, float | None] = {}
        learned_by = study.previous(row["method"])
        while increment and learned_by is not None:
            before = row_of(learned_by, row["seed"])
            classes = study.increments[study.increment_of(learned_by) - 1]
            lost |= forgetting_per_class(
                before["per_class"] if before else {}, row["per_class"], classes
            )
            learned_by = study.previous(learned_by)
        entry["forgetting"] = {c: lost[c] for c in chain(*study.increments) if c in lost}
        entry["mean_forgetting"] = mean_ap(lost, lost)
        last = increment == len(study.increments)
        entry["abs_gap"], entry["rel_gap"] = (
            gaps_to_upper_bound(entry["all"], bound_ap) if last else (None, None)
        )
        after.append(entry)
    return after


def increments_table(
    study: Study,
    rows: Sequence[Mapping[str, Any]],
    layout: Callable[[Sequence[Sequence[str]]], str] = format_text_table,
) -> str:
    """Return two tables as text, with means and standard deviations over seeds: metrics, and forgetting by class.

    Args:
        study: a class-incremental study.
        rows: rows of all methods.
        layout: formats a list of rows of cells.
    """
    of: dict[str, list[Mapping]] = {}
    for entry in increment_metrics(study, rows):
        of.setdefault(entry["method"], []).append(entry)
    columns = ["increment", "old", "new", "all", "forgetting", "AbsGap", "RelGap %"]
    lines = [["AP after each increment", *columns]]
    for method, entries in of.items():
        increment = study.increment_of(method)
        values = [[e[key] for e in entries] for key in ("old", "new", "all", "mean_forgetting")]
        values.append([e["abs_gap"] for e in entries])
        values.append([e["rel_gap"] and 100 * e["rel_gap"] for e in entries])
        lines.append(
            [method, str(increment or "all"), *(format_mean(column, 1) for column in values)]
        )
    text = layout(lines)
    learned = {m: entries for m, entries in of.items() if any(e["forgetting"] for e in entries)}
    if learned:
        lost = [["AP lost", *learned]]
        classes = dict.fromkeys(c for e in chain(*learned.values()) for c in e["forgetting"])
        for name in classes:
            columns = [[e["forgetting"].get(name) for e in found] for found in learned.values()]
            lost.append([f"  {name}", *(format_mean(column, 1) for column in columns)])
        text += "\n\n" + layout(lost)
    return text


def write_increments(output: Path, study: Study, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``increments.json``: the classes of each increment, and the result of :func:`increment_metrics`."""
    content = {"schema": 1, "increments": study.increments, "upper_bound": study.upper_bound}
    write_json(output / FILE, {**content, "rows": increment_metrics(study, rows)})


PerClass = Mapping[str, float | None]
"""Class -> AP in [0, 100]; None if the data set has no object of the class."""


def mean_ap_old_new_all(
    per_class: PerClass, increments: Sequence[Sequence[str]], increment: int
) -> dict[str, float | None]:
    """Return the mean AP of the ``old`` classes (of the increments before), the ``new`` ones (of this increment), and ``all``.

    Args:
        per_class: AP of a detector after ``increment``.
        increments: the classes of each increment.
        increment: starts from 1, where there are no old classes.

    Returns:
        means over the classes whose AP is defined; None if there is none.
    """
    old, new = list(chain(*increments[: increment - 1])), list(increments[increment - 1])
    return {
        name: mean_ap(per_class, of)
        for name, of in (("old", old), ("new", new), ("all", old + new))
    }


def mean_ap(per_class: PerClass, classes: Iterable[str]) -> float | None:
    """Return the mean over the classes whose AP is defined; None if there is none."""
    values = [per_class[name] for name in classes if per_class.get(name) is not None]
    return statistics.fmean(values) if values else None


def forgetting_per_class(
    before: PerClass, after: PerClass, classes: Iterable[str]
) -> dict[str, float | None]:
    """Return, for each class, the AP before minus the AP after; None if either is undefined."""
    lost = {}
    for name in classes:
        was, now = before.get(name), after.get(name)
        lost[name] = None if was is None or now is None else was - now
    return lost


def gaps_to_upper_bound(
    reached: float | None, upper_bound: float | None
) -> tuple[float | None, float | None]:
    """Return AbsGap and RelGap: the difference of an AP to the upper bound, in points and as a fraction of the latter."""
    if reached is None or not upper_bound:
        return None, None
    return upper_bound - reached, (upper_bound - reached) / upper_bound
