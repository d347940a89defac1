"""Results of a study: rows, paired gains, tables, and ``results.json``.

A *row* is a dict for one trained detector, as in ``results.json``. A *method* has one row per seed. Gains are paired:
two methods are compared seed by seed, since in short runs the seed affects the AP more than the method does.
"""

from __future__ import annotations

import math
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..comparison.accuracy import LABELS, METRICS
from ..comparison.labels import training_images
from ..utils.env import collect_versions
from ..utils.io import write_json, write_text
from ..visualization.curves import draw_curves
from ..visualization.panels import draw_differences
from .incremental import FILE as INCREMENTS
from .incremental import increments_table, write_increments
from .plan import Run, Study
from .plots import draw_gains
from .text import format_markdown_table, format_mean, format_text_table, t_interval

PREDICTIONS = "test/coco_instances_results.json"
"""File in a run's folder with the detections of the final weights on the test split."""

Row = Mapping[str, Any]


def defined_ap(value: float | None) -> float | None:
    """Return an AP in [0, 100], and None if it is undefined, for which COCO has -1 or NaN."""
    return None if value is None or not value >= 0 or math.isinf(value) else float(value)


def ap_metrics(metrics: Mapping[str, float], classes: Sequence[str]) -> dict[str, Any]:
    """Return the metrics of a row.

    Args:
        metrics: the "bbox" or "segm" results of COCOEvaluator.
        classes: class names of the data set; the AP of a class without a result is None.
    """
    per_class = {name: defined_ap(metrics.get(f"AP-{name}")) for name in classes}
    if len(classes) == 1:  # COCOEvaluator omits the AP of a single class
        per_class = {classes[0]: defined_ap(metrics.get("AP"))}
    return {**{key: defined_ap(metrics.get(key)) for key in METRICS}, "per_class": per_class}


def mask_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of detectors with masks, whose AP are then those of masks."""
    return [{**row, **row["segm"]} for row in rows if row.get("segm")]


def methods_of(rows: Sequence[Row]) -> list[str]:
    """Return the methods in the order of their first row."""
    return list(dict.fromkeys(row["method"] for row in rows))


def compute_gains(rows: Sequence[Row], method: str, reference: str) -> dict[str, Any]:
    """Compute the AP of a method minus that of a reference of the same seed.

    Returns:
        ``gains``, one per seed of the method in ascending order, None if either AP is undefined; their
        ``mean_gain``, ``std_gain`` (sample standard deviation; None for a single gain), and ``interval``, the 95 %
        confidence interval of the mean by Student's t (None for a single gain).
    """
    ap = {(row["method"], row["seed"]): row["AP"] for row in rows}
    seeds = sorted(seed for name, seed in ap if name == method)
    pairs = [(ap[method, seed], ap.get((reference, seed))) for seed in seeds]
    each = [None if None in pair else pair[0] - pair[1] for pair in pairs]
    defined = [gain for gain in each if gain is not None]
    return {
        "mean_gain": statistics.fmean(defined) if defined else None,
        "std_gain": statistics.stdev(defined) if len(defined) > 1 else None,
        "interval": t_interval(defined),
        "gains": each,
    }


def gains_over(
    rows: Sequence[Row], reference: str, paired: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return the :func:`compute_gains` of each method in ``paired`` that has rows."""
    found = methods_of(rows)
    return {
        method: compute_gains(rows, method, reference)
        for method in found
        if method in paired and method != reference and reference in found
    }


def format_results(
    rows: Sequence[Row],
    dataset: str,
    references: Sequence[str],
    paired: Sequence[str],
    layout: Callable[[Sequence[Sequence[str]]], str] = format_text_table,
) -> str:
    """Return the results and the gains of each method as text.

    The first table has a column per method: means and standard deviations over seeds. The second has a column per
    reference: mean gains with standard deviations and 95 % intervals, and the gain of each seed. A third has the gains in
    mask AP, if there are masks.

    Args:
        rows: rows of all methods.
        dataset: name of the test set.
        references: methods over which gains are computed.
        paired: methods whose gains are computed.
        layout: formats a list of rows of cells.
    """
    of = {method: [row for row in rows if row["method"] == method] for method in methods_of(rows)}

    def line(label: str, value, digits: int = 1) -> list[str]:
        return [
            label,
            *(format_mean([value(row) for row in group], digits) for group in of.values()),
        ]

    def ap_lines(prefix: str, part: Callable[[Row], Row]) -> list[list[str]]:
        lines = [
            line(prefix + LABELS.get(key, key), lambda row, key=key: part(row).get(key))
            for key in METRICS
        ]
        for name in dict.fromkeys(name for row in rows for name in row["per_class"]):
            lines.append(
                line(f"  {name}", lambda row, name=name: part(row).get("per_class", {}).get(name))
            )
        return lines

    reached = [[f"AP on {dataset}", *of], *ap_lines("", lambda row: row)]
    if masks := mask_rows(rows):
        reached += ap_lines("mask ", lambda row: row.get("segm") or {})
    reached.append(["parameters", *(f"{group[0]['parameters']:,}" for group in of.values())])
    reached.append(line("training seconds", lambda row: row["seconds"], 0))
    if any(row.get("peak_memory_mib") for row in rows):
        reached.append(line("peak memory, MiB", lambda row: row.get("peak_memory_mib"), 0))
    reached.append(
        ["seeds", *(" ".join(str(row["seed"]) for row in group) for group in of.values())]
    )

    tables = [reached, _gains_table("gain in AP", rows, references, paired)]
    tables.append(_gains_table("gain in mask AP", masks, references, paired))
    return "\n\n".join(layout(table) for table in tables if table)


def _gains_table(
    title: str, rows: Sequence[Row], references: Sequence[str], paired: Sequence[str]
) -> list[list[str]]:
    """Return the gains of each method as rows of cells; none if there are no gains."""
    over = {reference: gains_over(rows, reference, paired) for reference in references}
    over = {reference: found for reference, found in over.items() if found}
    if not over:
        return []
    gained = [[title, "", *(f"over {reference}" for reference in over)]]
    for method in dict.fromkeys(method for found in over.values() for method in found):
        found = [over[reference].get(method) for reference in over]
        seeds = sorted(row["seed"] for row in rows if row["method"] == method)
        if len(seeds) > 1:
            gained.append([method, "mean", *("" if g is None else _mean_gain(g) for g in found)])
            gained.append(["", "95 %", *("" if g is None else _interval(g) for g in found)])
        for index, seed in enumerate(seeds):
            each = ["" if g is None else _signed(g["gains"][index]) for g in found]
            gained.append(["" if len(seeds) > 1 else method, f"seed {seed}", *each])
    return gained


def _mean_gain(found: Mapping[str, Any]) -> str:
    spread = found["std_gain"]
    return _signed(found["mean_gain"]) + ("" if spread is None else f" ±{spread:.1f}")


def _interval(found: Mapping[str, Any]) -> str:
    if found["interval"] is None:
        return "-"
    return " to ".join(_signed(end) for end in found["interval"])


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{round(value, 1) + 0.0:+.1f}"  # + 0.0 turns -0.0 into 0.0


def format_training_time(rows: Sequence[Row]) -> str:
    """Return the number of runs and their total training time as text."""
    hours, minutes = divmod(round(sum(row["seconds"] for row in rows) / 60), 60)
    took = f"trained in {hours} h {minutes:02d} min"
    return f"1 run, {took}" if len(rows) == 1 else f"{len(rows)} runs, {took} added up"


def step_costs(rows: Sequence[Row], baseline: str) -> list[str]:
    """Return a line for each measured step cost of equal-time runs."""
    measured = [(row["method"], row["step_cost"]) for row in rows if row.get("step_cost")]
    lines = [
        f"{method}: {format_step_cost(cost, f'the steps of {baseline}')}"
        for method, cost in measured
    ]
    return list(dict.fromkeys(lines))


def format_step_cost(cost: Mapping[str, Any], unit: str) -> str:
    """Format a :class:`d2kd.benchmark.step_cost.StepCost`, given as a mapping."""
    ratio, low, high = (f"{cost[key]:.2f}" for key in ("ratio", "low", "high"))
    over = f"measured over {cost['pairs']} pairs of steps, {cost['clock']}"
    return f"{ratio} ({low} to {high}) times {unit}, {over}"


def provenance_table(rows: Sequence[Row]) -> str:
    """Return a markdown table with links to config and log of each row, and hashes of its weights."""
    masks = ["mask AP"] * bool(mask_rows(rows))
    lines = [["run", "AP", *masks, "config", "log", "weights", "teacher"]]
    for row in rows:
        links = [f"[{key}]({row['name']}/{Path(row[key]).name})" if row.get(key) else "-" for key in ("config", "log")]  # fmt: skip
        hashes = [(row.get(key) or "-")[:12] for key in ("weights_sha256", "teacher_sha256")]
        ap = [row["AP"], *((row.get("segm") or {}).get("AP") for _ in masks)]
        lines.append([row["name"], *(format_mean([x], 1) for x in ap), *links, *hashes])
    return format_markdown_table(lines)


def write_results(output: Path, study: Study, rows: Sequence[Mapping]) -> None:
    """Write ``results.json``, with gains over the baseline; ``gains.json``, with gains over every reference; and
    ``increments.json`` of a class-incremental study."""
    results = {
        "schema": 1,
        "command": shlex.join(sys.argv),
        "versions": collect_versions(),
        "dataset": study.test,
        "baseline": study.baseline,
        "featured": study.featured,
        "rows": list(rows),
        "summary": gains_over(rows, study.baseline, study.paired),
    }
    over = []
    for reference in study.references:
        segm = gains_over(mask_rows(rows), reference, study.paired)
        for method, found in gains_over(rows, reference, study.paired).items():
            masks = {"segm": segm[method]} if method in segm else {}
            over.append({"method": method, "reference": reference, **found, **masks})
    write_json(output / "results.json", results)
    write_json(output / "gains.json", {"schema": 1, "rows": over})
    if study.increments:
        write_increments(output, study, rows)


def write_tables_and_plots(
    output: Path, study: Study, runs: Sequence[Run], rows: Sequence[Mapping]
) -> str:
    """Draw curves and pictures; return the final output: tables, training time, and the files to open."""
    whole = [row for row in rows if study.has_all_classes(row["method"])]

    def tables(layout: Callable[[Sequence[Sequence[str]]], str]) -> str:
        parts = [increments_table(study, rows, layout)] if study.increments else []
        if whole:  # empty if no run has learned all increments yet
            parts.append(format_results(whole, study.test, study.references, study.paired, layout))
        counts = (
            [row["method"], row.get("train_images"), row.get("pseudo_labelled_images")]
            for row in rows
        )
        differ = filter(None, [training_images(counts)])
        costs = step_costs(rows, study.baseline)
        return "\n\n".join([*parts, format_training_time(rows), *differ, *costs])

    text, written = tables(format_text_table), tables(format_markdown_table)
    write_text(output / "table.txt", f"{study.title}\n\n{text}\n")
    write_text(output / "table.md", f"# {study.title}\n\n{written}\n\n{provenance_table(rows)}\n")
    over = {name: gains_over(whole, name, study.paired) for name in study.references}
    curves: dict[str, list[Path]] = {}
    for row in rows:
        curves.setdefault(row["method"], []).append(output / row["name"] / "metrics.json")
    draw_curves(output / "curves.png", curves, study.title)
    opens = [
        (output / "curves.png", "task losses and validation AP against iterations"),
        (output / "table.txt", "this table"),
        (output / "table.md", "this table as markdown, with config, log and weights of each run"),
        (output / "results.json", "all figures, with config, log and weights of each run"),
    ]
    if any(over.values()):
        draw_gains(output / "gains.png", over, study.title)
        opens.insert(0, (output / "gains.png", "gains in AP, seed by seed, with their intervals"))
    if study.increments:
        opens.append((output / INCREMENTS, "the metrics after each increment"))
    named = [row["name"] for row in rows]
    first = {run.method: run for run in reversed(runs) if run.name in named}
    if study.pictures and study.featured in first and study.baseline in first:
        featured = first[study.featured]
        shown = [
            name for name in (featured.teacher, first[study.baseline].name, featured.name) if name
        ]
        files = {name: output / name / PREDICTIONS for name in shown}
        draw_differences(output / "pictures", featured.test, files, study.pictures, study.threshold)
        what = f"ground truth | {' | '.join(shown)}, where the last two differ most"
        opens.insert(0, (output / "pictures", what))
    width = max(len(str(path)) for path, _ in opens)
    return f"{text}\n\nOpen\n" + "\n".join(
        f"  {str(path):<{width}}  {what}" for path, what in opens
    )
