"""HTML report of a comparison: one self-contained page for screens, phones and print."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from ..comparison.accuracy import LABELS, METRICS
from ..comparison.comparison import Comparison, Gain
from ..comparison.error_types import ERROR_TYPES
from ..comparison.labels import training_images
from ..utils.io import write_text
from .pictures import LOST, WON, Pictures

COLORS = ("#4b5668", "#d18b1f", "#0f8577", "#7a5bb0", "#c0496b", "#2f6fb5", "#7c8a2c")
"""Colors of the detectors; see :func:`detector_colors`."""
MEANINGS = {
    "classification": "right place, wrong class",
    "localization": "right class, overlap 0.1 to 0.5",
    "both": "wrong class, little overlap",
    "duplicate": "object already found",
    "background": "no object",
    "missed": "object not found",
}
MAX_CLASSES = 24
"""Maximum number of classes in the chart; the table has all classes."""


def write_report(comparison: Comparison, folder: str | Path) -> Path:
    """Write ``report.json`` and ``report.html`` into a folder, and return the path of the page.

    Args:
        comparison: the comparison to show. Images are read from the data set; a missing one is left blank.
        folder: output folder; created if needed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    comparison.save(folder / "report.json")
    page = folder / "report.html"
    write_text(page, render(comparison))
    return page


def render(comparison: Comparison) -> str:
    """Return the HTML text of the page."""
    environment = Environment(
        loader=PackageLoader("d2kd.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= FILTERS
    return environment.get_template("report.html").render(**_values(comparison))


def _values(c: Comparison) -> dict[str, Any]:
    """Return the variables of the template."""
    color = detector_colors(c)
    headline = None
    if len(c.detectors) > 1:
        headline = c.gain(c.featured, c.baseline).metrics["AP"]
    costs = [v for d in c.detectors for v in d.errors.cost.values()]
    observation = c.observation
    why = observation.why_no_regions if observation else "only detections are given"
    pairs = observation.regions["pairs"] if observation and observation.regions else []
    pictures = Pictures(c, color)
    class_gains = _class_gains(c, color)
    return {
        "c": c,
        "color": color,
        "title": f"{c.featured} on {c.dataset['name']}",
        "sentence": summary_sentence(c),
        "training_images": training_images(
            (d.name, *map(d.provenance.get, ("train_images", "pseudo_labelled_images")))
            for d in c.detectors
        ),
        "headline": headline,
        "headline_domain": ValueRange.around([headline]) if headline else None,
        "errors": [_error_row(c, kind) for kind in ERROR_TYPES],
        "error_domain": ValueRange(0, max([v for v in costs if v is not None] or [1]) or 1),
        "won": pictures.tiles(c.objects.won_objects),
        "lost": pictures.tiles(c.objects.lost_objects),
        "won_color": WON,
        "lost_color": LOST,
        "gallery": pictures.gallery(c.objects.gallery),
        "panels": len(c.detectors) + 1,
        "metrics": [(name, LABELS.get(name, name)) for name in METRICS],
        "with_masks": any(d.mask_accuracy for d in c.detectors),
        "gains_shown": [g for g in c.gains if g.over == c.baseline and g.of != c.reference],
        "curves": _curves(c, color),
        "class_gains": class_gains,
        "class_domain": ValueRange.around(class_gains),
        "class_rows": _class_rows(c),
        "regions": observation and observation.regions,
        "why_no_regions": why,
        "reference_pairs": [pair for pair in pairs if pair["first"] == c.reference],
        "pair_parts": _pair_parts,
        "moved": [
            *c.objects.by_size.items(),
            *((name, both) for name, both in c.objects.by_class.items() if any(both.values())),
        ],
        "features": observation and observation.features,
        **_features(c),
    }


def detector_colors(c: Comparison) -> dict[str, str]:
    """Return detector -> color. With two detectors or more the featured one has the third color."""
    order = [c.reference, c.baseline, c.featured, *(d.name for d in c.detectors[2:-1])]
    color: dict[str, str] = {}
    for place, name in enumerate(order):
        color.setdefault(name, COLORS[place % len(COLORS)])
    return {d.name: color[d.name] for d in c.detectors}


def summary_sentence(c: Comparison) -> str:
    """Summarize the comparison in one sentence."""
    featured_ap = c[c.featured].accuracy.metrics["AP"]
    if len(c.detectors) == 1:
        return f"{c.featured} has an AP of {_ap(featured_ap)} on {c.dataset['name']}."
    gain = c.gain(c.featured, c.baseline).metrics["AP"]
    if gain["gain"] is None:
        return f"The AP of {c.featured} or {c.baseline} is undefined on {c.dataset['name']}."
    baseline_ap = c[c.baseline].accuracy.metrics["AP"]
    objects = c.objects
    text = (
        f"{c.featured} finds {objects.won:,} objects that {c.baseline} does not, loses {objects.lost:,} "
        f"that it does, and has an AP of {_ap(featured_ap)} compared with {_ap(baseline_ap)}"
    )
    low, high = gain["interval"] or (None, None)
    if low is not None and low <= 0 <= high:
        text += ", a difference whose 95 % interval contains 0"
    elif len(c.detectors) > 2:
        best = c.detectors[0].accuracy.metrics["AP"]
        if best is not None and best > baseline_ap and gain["gain"] > 0:
            text += f": {100 * gain['gain'] / (best - baseline_ap):.0f} % of the way to {c.reference}’s {_ap(best)}"
    return text + "."


@dataclass(frozen=True)
class ValueRange:
    """Range of values of a chart."""

    low: float
    high: float

    @classmethod
    def around(cls, rows: Iterable[dict[str, Any]]) -> ValueRange:
        """Return a range that contains zero and all gains and intervals, with a margin."""
        values = [0.0]
        for row in rows:
            values += [v for v in (row["gain"], *(row["interval"] or ())) if v is not None]
        margin = 0.06 * (max(values) - min(values)) or 1
        return cls(min(values) - margin, max(values) + margin)

    def at(self, value: float) -> float:
        """Return the position of a value in percent of the range."""
        return round(100 * (value - self.low) / (self.high - self.low), 2)


def _error_row(c: Comparison, kind: str) -> dict[str, Any]:
    return {
        "name": kind,
        "meaning": MEANINGS[kind],
        "before": c[c.baseline].errors.cost[kind],
        "after": c[c.featured].errors.cost[kind],
        "others": [
            (d.name, d.errors.cost[kind])
            for d in c.detectors
            if d.name not in (c.baseline, c.featured)
        ],
    }


def _class_gains(c: Comparison, color: dict[str, str]) -> list[dict[str, Any]]:
    gain: Gain | None = c.gain(c.featured, c.baseline)
    if gain is None:
        return []
    rows = [
        {"name": name, **gain.per_class[name], "color": color[c.featured]}
        for name in c.compared_classes
        if gain.per_class[name]["gain"] is not None
    ]
    rows.sort(key=lambda row: -abs(row["gain"]))
    return sorted(rows[:MAX_CLASSES], key=lambda row: -row["gain"])


def _class_rows(c: Comparison) -> list[dict[str, Any]]:
    rows = []
    for name in c.dataset["classes"]:
        values = [
            "unknown" if name in d.missing_classes else _ap(d.accuracy.per_class[name])
            for d in c.detectors
        ]
        none = name in c.dataset["without_objects"]
        objects = "none" if none else _count(c.dataset["objects_of"][name])
        rows.append({"name": name, "objects": objects, "cells": values})
    only = {name: d for d in c.detectors for name in d.unique_classes}
    for name, d in only.items():
        values = ["not in the data" if d is other else "unknown" for other in c.detectors]
        rows.append({"name": name, "objects": "none", "cells": values})
    return rows


def _pair_parts(pair: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    named = [("all", pair["all"]), ("objects", pair["foreground"])]
    named += [("background", pair["background"])]
    return [*named, *pair["by_size"].items(), *pair["by_class"].items()]


def _features(c: Comparison) -> dict[str, Any]:
    rows = c.observation.features["rows"] if c.observation else []
    names = list(dict.fromkeys(row["second"] for row in rows))
    levels = list(dict.fromkeys(row["level"] for row in rows))
    at = {(row["second"], row["level"]): row for row in rows}
    return {
        "feature_names": names,
        "feature_rows": [(level, [at[name, level] for name in names]) for level in levels],
    }


def _curves(c: Comparison, color: dict[str, str]) -> Markup:
    """Draw the precision-recall curves as SVG; this needs no plotting library."""
    drawn = [(d.name, d.accuracy.precision) for d in c.detectors if d.accuracy.precision]
    if not drawn:
        return Markup("")
    width, height, left, bottom = 440, 300, 40, 34
    w, h = width - left - 16, height - bottom - 8

    def xy(recall: float, precision: float) -> str:
        return f"{left + w * recall:.1f},{8 + h * (1 - precision):.1f}"

    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x, y = xy(tick, tick).split(",")
        parts.append(f'<path d="M{left} {y}H{left + w}" stroke="#e3e6eb"/>')
        parts.append(
            f'<text x="{left - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{tick * 100:.0f}</text>'
        )
        parts.append(
            f'<text x="{x}" y="{height - 16}" text-anchor="middle">{tick * 100:.0f}</text>'
        )
    for name, precision in drawn:
        points = " ".join(xy(i / (len(precision) - 1), p) for i, p in enumerate(precision))
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{color[name]}" stroke-width="2">'
            f"<title>{escape(name)}</title></polyline>"
        )
    parts.append(f'<text x="{left + w / 2}" y="{height - 2}" text-anchor="middle">recall, %</text>')
    return Markup(
        f'<svg class="curves" viewBox="0 0 {width} {height}" role="img" font-size="11" fill="#667085" '
        f'aria-label="precision against recall">{"".join(parts)}</svg>'
    )


MISSING = "–"


def _number(digits: int, scale: float = 1, sign: bool = False):
    """Return a template filter that formats a number with a minus sign, and an undefined one as a dash."""

    def write(value: float | None) -> str:
        if value is None or not math.isfinite(value):
            return MISSING
        text = f"{round(value * scale, digits) + 0.0:{'+' if sign else ''}.{digits}f}"
        return text.replace("-", "−")

    return write


_ap = _number(1)


def _count(value: int | None) -> str:
    return MISSING if value is None else f"{value:,}"


def _between(write):
    def text(pair: Sequence[float] | None) -> str:
        return "" if pair is None else f"{write(pair[0])} to {write(pair[1])}"

    return text


FILTERS = {
    "ap": _ap,
    "signed": _number(1, sign=True),
    "signed_two": _number(2, sign=True),
    "signed_count": _number(0, sign=True),
    "two": _number(2),
    "three": _number(3),
    "percent": lambda value: MISSING if value is None else f"{100 * value:.1f} %",
    "count": _count,
    "between": _between(_ap),
    "between_signed": _between(_number(1, sign=True)),
}
