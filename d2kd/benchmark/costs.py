"""The cost table of several recipes, measured in turn."""

from __future__ import annotations

import gc
import itertools
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

import numpy as np
import torch
from tabulate import tabulate

from ..utils.console import Progress
from ..utils.env import versions
from ..utils.errors import InputError
from .bench import (
    BATCHES,
    DISTILLED,
    SEED,
    STOCK,
    STUDENT,
    TEACHER,
    WARM_UPS,
    Bench,
    Setup,
    peak_memory,
)
from .feeding import check_data, feeding
from .phases import PHASES
from .step_cost import bootstrap_medians
from .untrained import OBJECTS

HEADLINE = "distilled / (student + teacher)"
"""The ratio a bound is about."""

RATIOS = {
    HEADLINE: ((DISTILLED,), (STUDENT, TEACHER)),
    "distilled / student": ((DISTILLED,), (STUDENT,)),
    "teacher / student": ((TEACHER,), (STUDENT,)),
    "student / Detectron2's": ((STUDENT,), (STOCK,)),
}
"""Rows whose seconds are added up, and those they are divided by."""

MIB = 2**20
PHASE_ROUNDS = 5

Seconds = dict[tuple[str, str], list[float]]
"""Seconds by round, of (recipe, row)."""


def median_interval(values: Sequence[float], draws: int = 10_000) -> dict[str, float]:
    """The median, and the 2.5th and 97.5th percentile of the medians of bootstrap samples (seeded)."""
    medians = bootstrap_medians(values, np.random.default_rng(SEED), draws)
    low, high = np.percentile(medians, [2.5, 97.5])
    return {"median": float(np.median(values)), "low": float(low), "high": float(high)}


def measure(
    benches: Mapping[str, Bench], rounds: int, report: Callable[[int, int], None]
) -> Seconds:
    """Time every row of every bench, all rows of a round on the same batch, each the first in turn.

    Args:
        rounds: how many, after three that are not counted.
        report: told (rounds done, rounds in all) before each.
    """
    rows = [(label, name) for label, bench in benches.items() for name in bench.rows]
    seconds: Seconds = {row: [] for row in rows}
    for k in range(WARM_UPS + rounds):
        report(k, WARM_UPS + rounds)
        first = k % len(rows)
        for label, name in rows[first:] + rows[:first]:
            seconds[label, name].append(benches[label].seconds(name, k % BATCHES))
    return {row: values[WARM_UPS:] for row, values in seconds.items()}


def ratios(
    seconds: Seconds, plain: Mapping[str, str], variant_of: Mapping[str, str]
) -> list[dict[str, Any]]:
    """What rows cost relative to each other, round by round.

    Args:
        seconds: of all rows.
        plain: {recipe: the one whose plain rows are its own, too}.
        variant_of: {recipe: the one it is a variant of}; its distilled step is compared with that one's, and
            with that one's parts.

    Returns:
        dicts of ``recipe``, ``ratio``, ``median``, ``low`` and ``high``.
    """

    def total(recipe: str, names: Sequence[str]) -> np.ndarray | None:
        found = [
            seconds.get((recipe if name in (TEACHER, DISTILLED) else plain[recipe], name))
            for name in names
        ]
        return None if None in found else np.sum(found, axis=0)

    result = []
    for recipe in plain:
        pairs = {
            name: (total(recipe, above), total(recipe, below))
            for name, (above, below) in RATIOS.items()
        }
        if base := variant_of.get(recipe):
            own = total(recipe, [DISTILLED])
            pairs[f"distilled / that of {base}"] = own, total(base, [DISTILLED])
            pairs[f"distilled / (student + teacher) of {base}"] = (
                own,
                total(base, [STUDENT, TEACHER]),
            )
        for name, (above, below) in pairs.items():
            if above is not None and below is not None:
                result.append({"recipe": recipe, "ratio": name, **median_interval(above / below)})
    return result


def difference(ours: Mapping[str, float], theirs: Mapping[str, float]) -> float:
    """The largest relative difference of two sets of losses; infinite if their names differ."""
    if ours.keys() != theirs.keys():
        return float("inf")
    pairs = [(ours[name], theirs[name]) for name in ours]
    return max((abs(a - b) / max(abs(b), 1e-12) for a, b in pairs), default=0.0)


def mean_phases(bench: Bench, name: str) -> dict[str, float] | None:
    """Median seconds of each phase over some steps of a row."""
    found = [bench.phases(name, k % BATCHES) for k in range(PHASE_ROUNDS)]
    if None in found:
        return None
    return {phase: float(np.median([each[phase] for each in found])) for phase in PHASES}


def benchmark(
    setups: Sequence[Setup],
    variant_of: Mapping[str, str] | None = None,
    rounds: int = 15,
    console: TextIO | None = None,
    data_steps: int = 0,
    memory: bool = True,
    keep: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Measure time, all rows in this process, then whether data keep up, then memory, each row in a process of its own.

    Args:
        setups: what to measure, by different labels. Where the plain step is the same, it is measured once.
        variant_of: {label: that of the setup it is a variant of}.
        rounds: how often each row is timed.
        console: where progress is shown; stdout by default.
        data_steps: how many distilled steps each recipe's own loader feeds; 0: no data are read.
        memory: whether to measure its peak; every row then has its detectors built and warmed up once more.
        keep: given the result as far as it goes: the times, which are there long before the memory, and then each
            time that there is more.

    Returns:
        what the JSON file holds: the circumstances; ``recipes`` with ``asked`` (what the losses read of the
        teacher), ``losses`` on the first batch and ``difference`` (relative, from what it is a variant of);
        ``rows`` of ``recipe``, ``name``, ``median_seconds``, ``low_seconds`` and ``high_seconds`` (quartiles),
        ``seconds`` by round, ``images_per_second``, ``phases`` in seconds, ``peak_memory_mib`` (of weights and
        steps; None if unknown or not asked for) and ``weights_mib``; ``ratios``; and ``data``, of each recipe what
        :func:`~d2kd.benchmark.feeding.feeding` returns.

    Raises:
        InputError: see :class:`Bench`; no rounds, two setups of one label, data that cannot be read, or recipes that
            differ in ``train.cudnn_benchmark``.
    """
    for culprit, count, least in (("rounds", rounds, 1), ("data steps", data_steps, 0)):
        if count < least:
            raise InputError(culprit, count, f"at least {least}")
    labels = [setup.label for setup in setups]
    for label, count in ((label, labels.count(label)) for label in labels):
        if count > 1:
            raise InputError("label", f"{label!r} {count} times", "a label of its own for each")
    variant_of = variant_of or {}
    console = console or sys.stdout
    # First, so that a recipe that cannot be used is all there is to say.
    chosen = {bool(setup.recipe().train.cudnn_benchmark) for setup in setups}
    if len(chosen) > 1:
        expected = "one for all recipes, for a process keeps the algorithms it chose first"
        raise InputError("train.cudnn_benchmark", "true and false", expected)
    print(f"building, and statistics of {BATCHES} batches …", file=console, flush=True)
    benches = {setup.label: Bench(setup) for setup in setups}
    for bench in benches.values() if data_steps else ():
        check_data(bench)
    firsts: dict[str, str] = {}
    plain = {label: firsts.setdefault(bench.plain, label) for label, bench in benches.items()}
    for label, bench in benches.items():
        if plain[label] != label:
            bench.rows.pop(STUDENT)
        if plain[label] != label or label in variant_of:
            bench.rows.pop(STOCK, None)  # which knows no variants

    line = Progress("time", console)
    seconds = measure(benches, rounds, line)
    line.close(f"{rounds} rounds, after {WARM_UPS} to warm up")
    phases = {(label, name): mean_phases(benches[label], name) for label, name in seconds}
    recipes = [_recipe(setup, benches, variant_of) for setup in setups]
    data = []
    for setup in setups if data_steps else ():
        line = Progress(f"data of {setup.label}", console)
        fed = feeding(benches[setup.label], setup.batch_size, data_steps, line)
        line.close(f"{data_steps} batches alone, {data_steps} steps")
        data.append({"recipe": setup.label, **fed})
    device = next(iter(benches.values())).device
    weights = {(label, name): benches[label].rows[name].weights for label, name in seconds}
    # The processes below shall have the whole machine.
    benches.clear()
    del bench  # the loops' last one
    gc.collect()  # their rows refer to them
    torch.cuda.empty_cache()

    by_label = {setup.label: setup for setup in setups}
    rows = []
    for (label, name), values in seconds.items():
        low, median, high = np.percentile(values, [25, 50, 75])
        rows.append(
            {
                "recipe": label,
                "name": name,
                "median_seconds": float(median),
                "low_seconds": float(low),
                "high_seconds": float(high),
                "seconds": values,
                "images_per_second": by_label[label].batch_size / float(median),
                "phases": phases[label, name],
                "peak_memory_mib": None,
                "weights_mib": weights[label, name] / MIB,
            }
        )
    result = {
        "schema": 2,
        "command": shlex.join(sys.argv),
        "versions": versions(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "image_sizes": [list(size) for size in setups[0].image_sizes],
        "batch_size": setups[0].batch_size,
        "rounds": rounds,
        "recipes": recipes,
        "rows": rows,
        "ratios": ratios(seconds, plain, variant_of),
        "data": data,
    }
    if keep is not None:
        keep(result)
    if not memory:
        return result
    line = Progress("memory", console)
    for done, row in enumerate(rows):
        line(done, len(rows))
        peak = peak_memory(by_label[row["recipe"]], row["name"])
        row["peak_memory_mib"] = None if peak is None else peak / MIB
        if keep is not None:
            keep(result)
    line.close(f"{len(rows)} rows, each in a process of its own")
    return result


def _recipe(
    setup: Setup, benches: Mapping[str, Bench], variant_of: Mapping[str, str]
) -> dict[str, Any]:
    bench, base = benches[setup.label], benches.get(variant_of.get(setup.label, ""))
    read = itertools.chain.from_iterable(question.read for question in bench.questions)
    return {
        "label": setup.label,
        "config": setup.config_file,
        "overrides": list(setup.overrides),
        "asked": list(dict.fromkeys(read)),
        "losses": bench.losses,
        "difference": None if base is None else difference(bench.losses, base.losses),
    }


def table(result: Mapping[str, Any], style: str = "simple") -> str:
    """A result of :func:`benchmark` as text.

    Args:
        result: it.
        style: of tabulate, such as "simple" or "github" for markdown.
    """
    sizes = ", ".join(f"{height} x {width}" for height, width in result["image_sizes"])
    threads = f", threads: {result['threads']}" if result["device"] == "cpu" else ""
    lines = [
        f"{sizes} px, {result['batch_size']} images a batch, {OBJECTS} objects an image, "
        f"{result['device']}{threads}; half-way through the run; {result['rounds']} rounds"
    ]
    for recipe in result["recipes"]:
        overrides = f" {shlex.join(recipe['overrides'])}" if recipe["overrides"] else ""
        differs = recipe["difference"]
        lines += [
            "",
            f"{recipe['label']}: {recipe['config']}{overrides}",
            f"  asked of the teacher: {', '.join(recipe['asked']) or 'nothing'}",
        ]
        if differs is not None:
            lines.append(f"  its losses differ by {differs:.1e} of their size, at most")

    rows = result["rows"]
    steps = [
        [row["recipe"], row["name"]]
        + [row[key] for key in ("median_seconds", "low_seconds", "high_seconds")]
        + [row[key] for key in ("images_per_second", "peak_memory_mib", "weights_mib")]
        for row in rows
    ]
    where = [
        [row["recipe"], row["name"], *(row["phases"][phase] for phase in PHASES)]
        for row in rows
        if row["phases"] is not None
    ]
    compared = [list(ratio.values()) for ratio in result["ratios"]]
    fed = [
        [row["recipe"], DISTILLED, row["workers"], row["loader_images_per_second"]]
        + [row[key] for key in ("images_per_second", "median_seconds", "waiting_seconds")]
        for row in result["data"]
    ]

    def block(body: list[list], headers: list[str], form: Sequence[str]) -> list[str]:
        text = tabulate(body, headers, tablefmt=style, floatfmt=("", "", *form), missingval="-")
        return ["", text]

    headers = ["recipe", "one step", "median s", "25 %", "75 %", "images/s", "peak MiB", "weights MiB"]  # fmt: skip
    lines += block(steps, headers, [".4f"] * 3 + [".2f", ".0f", ".0f"])
    lines += block(where, ["recipe", "seconds go to", *PHASES], [".4f"] * len(PHASES))
    lines += block(compared, ["recipe", "ratio", "median", "95 % from", "to"], [".3f"] * 3)
    if fed:
        headers = ["recipe", "fed by its loader", "workers", "loader alone, images/s", "images/s", "median s", "waiting s"]  # fmt: skip
        lines += block(fed, headers, [".0f", ".1f", ".2f", ".4f", ".4f"])
    return "\n".join(lines)
