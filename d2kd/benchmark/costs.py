"""The cost table of several recipes."""

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

from ..utils.console import ProgressBar
from ..utils.env import collect_versions
from ..utils.errors import InputError
from .bench import (
    BATCHES,
    DETECTRON2,
    DISTILLED,
    SEED,
    STUDENT,
    TEACHER,
    WARM_UPS,
    Bench,
    BenchmarkCase,
    peak_memory,
)
from .data_loading import check_loadable, measure_data_loading
from .phases import PHASES
from .step_cost import bootstrap_medians
from .untrained import OBJECTS

MAIN_RATIO = "distilled / (student + teacher)"
"""The main ratio."""

RATIOS = {
    MAIN_RATIO: ((DISTILLED,), (STUDENT, TEACHER)),
    "distilled / student": ((DISTILLED,), (STUDENT,)),
    "teacher / student": ((TEACHER,), (STUDENT,)),
    "student / Detectron2's": ((STUDENT,), (DETECTRON2,)),
}
"""Ratio -> the rows of its numerator and of its denominator, whose times are added up."""

MIB = 2**20
PHASE_ROUNDS = 5

Seconds = dict[tuple[str, str], list[float]]
"""(recipe, row) -> seconds of each round."""


def median_interval(values: Sequence[float], draws: int = 10_000) -> dict[str, float]:
    """Return the median, and its 95 % interval by a seeded bootstrap."""
    medians = bootstrap_medians(values, np.random.default_rng(SEED), draws)
    low, high = np.percentile(medians, [2.5, 97.5])
    return {"median": float(np.median(values)), "low": float(low), "high": float(high)}


def time_rows(
    benches: Mapping[str, Bench], rounds: int, progress: Callable[[int, int], None]
) -> Seconds:
    """Measure the times of all rows. The rows of a round use the same batch, and take turns in being the first.

    Args:
        rounds: number of rounds, after three for warm-up.
        progress: progress callback, called with (rounds done, rounds) before each round.
    """
    rows = [(label, name) for label, bench in benches.items() for name in bench.rows]
    seconds: Seconds = {row: [] for row in rows}
    for k in range(WARM_UPS + rounds):
        progress(k, WARM_UPS + rounds)
        first = k % len(rows)
        for label, name in rows[first:] + rows[:first]:
            seconds[label, name].append(benches[label].seconds(name, k % BATCHES))
    return {row: values[WARM_UPS:] for row, values in seconds.items()}


def time_ratios(
    seconds: Seconds, plain: Mapping[str, str], variant_of: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Compute the ratios of times, round by round.

    Args:
        seconds: times of all rows.
        plain: recipe -> the recipe whose plain rows it shares.
        variant_of: recipe -> its base recipe. Its distilled step is compared with that step and the parts of the base.

    Returns:
        dicts with ``recipe``, ``ratio``, ``median``, ``low`` and ``high``.
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


def max_relative_difference(a: Mapping[str, float], b: Mapping[str, float]) -> float:
    """Return the largest relative difference of two dicts of losses; infinite if their keys differ."""
    if a.keys() != b.keys():
        return float("inf")
    return max((abs(a[name] - b[name]) / max(abs(b[name]), 1e-12) for name in a), default=0.0)


def median_phases(bench: Bench, name: str) -> dict[str, float] | None:
    """Return the median time of each phase over some steps of a row."""
    found = [bench.phases(name, k % BATCHES) for k in range(PHASE_ROUNDS)]
    if None in found:
        return None
    return {phase: float(np.median([each[phase] for each in found])) for phase in PHASES}


def benchmark(
    setups: Sequence[BenchmarkCase],
    variant_of: Mapping[str, str] | None = None,
    rounds: int = 15,
    console: TextIO | None = None,
    data_steps: int = 0,
    memory: bool = True,
    on_result: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Measure times in this process, then data loading, then peak memory with a new process per row.

    Args:
        setups: what to measure, with different labels. A plain step that several have in common is measured once.
        variant_of: label -> label of the base recipe.
        rounds: number of times each row is timed.
        console: stream of the progress output; default: stdout.
        data_steps: number of distilled steps with the recipe's data loader; 0: no data is read.
        memory: whether to measure peak memory, which builds the detectors of each row again.
        on_result: called with the result so far, first after the times and then after each peak memory.

    Returns:
        content of the JSON file: the settings; ``recipes`` with ``teacher_outputs`` (teacher outputs that the losses read),
        ``losses`` on the first batch and ``difference`` (the largest relative one, to the base recipe);
        ``rows`` with ``recipe``, ``name``, ``median_seconds``, ``low_seconds`` and ``high_seconds`` (quartiles),
        ``seconds`` of each round, ``images_per_second``, ``phases`` in seconds, ``peak_memory_mib`` (including weights;
        None if unknown or not measured) and ``weights_mib``; ``ratios``; and ``data`` with the results of
        :func:`~d2kd.benchmark.data_loading.measure_data_loading` for each recipe.

    Raises:
        InputError: see :class:`Bench`; no rounds, equal labels, data that cannot be read, or different values of
            ``train.cudnn_benchmark``.
    """
    for culprit, count, least in (("rounds", rounds, 1), ("data steps", data_steps, 0)):
        if count < least:
            raise InputError(culprit, count, f"at least {least}")
    labels = [setup.label for setup in setups]
    for label, count in ((label, labels.count(label)) for label in labels):
        if count > 1:
            raise InputError("label", f"{label!r} {count} times", "different labels")
    variant_of = variant_of or {}
    console = console or sys.stdout
    # First, so that an unusable recipe is reported before any other output.
    chosen = {bool(setup.recipe().train.cudnn_benchmark) for setup in setups}
    if len(chosen) > 1:
        expected = "one value, since a process keeps the algorithms that it selects first"
        raise InputError("train.cudnn_benchmark", "true and false", expected)
    print(f"building, with norms of {BATCHES} batches …", file=console, flush=True)
    benches = {setup.label: Bench(setup) for setup in setups}
    for bench in benches.values() if data_steps else ():
        check_loadable(bench)
    firsts: dict[str, str] = {}
    plain = {label: firsts.setdefault(bench.plain, label) for label, bench in benches.items()}
    for label, bench in benches.items():
        if plain[label] != label:
            bench.rows.pop(STUDENT)
        if plain[label] != label or label in variant_of:
            bench.rows.pop(DETECTRON2, None)  # a variant has the same plain step

    line = ProgressBar("time", console)
    seconds = time_rows(benches, rounds, line)
    line.close(f"{rounds} rounds, after {WARM_UPS} for warm-up")
    phases = {(label, name): median_phases(benches[label], name) for label, name in seconds}
    recipes = [_recipe(setup, benches, variant_of) for setup in setups]
    data = []
    for setup in setups if data_steps else ():
        line = ProgressBar(f"data of {setup.label}", console)
        fed = measure_data_loading(benches[setup.label], setup.batch_size, data_steps, line)
        line.close(f"{data_steps} batches without training, {data_steps} steps")
        data.append({"recipe": setup.label, **fed})
    device = next(iter(benches.values())).device
    weights = {(label, name): benches[label].rows[name].weights for label, name in seconds}
    # Free all memory for the processes below.
    benches.clear()
    del bench  # the variable of the loops above
    gc.collect()  # rows and benches are in reference cycles
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
        "versions": collect_versions(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "image_sizes": [list(size) for size in setups[0].image_sizes],
        "batch_size": setups[0].batch_size,
        "rounds": rounds,
        "recipes": recipes,
        "rows": rows,
        "ratios": time_ratios(seconds, plain, variant_of),
        "data": data,
    }
    if on_result is not None:
        on_result(result)
    if not memory:
        return result
    line = ProgressBar("memory", console)
    for done, row in enumerate(rows):
        line(done, len(rows))
        peak = peak_memory(by_label[row["recipe"]], row["name"])
        row["peak_memory_mib"] = None if peak is None else peak / MIB
        if on_result is not None:
            on_result(result)
    line.close(f"{len(rows)} rows, each in its own process")
    return result


def _recipe(
    setup: BenchmarkCase, benches: Mapping[str, Bench], variant_of: Mapping[str, str]
) -> dict[str, Any]:
    bench, base = benches[setup.label], benches.get(variant_of.get(setup.label, ""))
    read = itertools.chain.from_iterable(reads.read for reads in bench.teacher_reads)
    return {
        "label": setup.label,
        "config": setup.config_file,
        "overrides": list(setup.overrides),
        "teacher_outputs": list(dict.fromkeys(read)),
        "losses": bench.losses,
        "difference": None if base is None else max_relative_difference(bench.losses, base.losses),
    }


def format_costs(result: Mapping[str, Any], style: str = "simple") -> str:
    """Format a result of :func:`benchmark` as text.

    Args:
        result: the result.
        style: table format of tabulate, such as "simple", or "github" for markdown.
    """
    sizes = ", ".join(f"{height} x {width}" for height, width in result["image_sizes"])
    threads = f", threads: {result['threads']}" if result["device"] == "cpu" else ""
    lines = [
        f"{sizes} px, {result['batch_size']} images per batch, {OBJECTS} objects per image, "
        f"{result['device']}{threads}; progress 0.5; {result['rounds']} rounds"
    ]
    for recipe in result["recipes"]:
        overrides = f" {shlex.join(recipe['overrides'])}" if recipe["overrides"] else ""
        differs = recipe["difference"]
        lines += [
            "",
            f"{recipe['label']}: {recipe['config']}{overrides}",
            f"  teacher outputs read: {', '.join(recipe['teacher_outputs']) or 'none'}",
        ]
        if differs is not None:
            lines.append(f"  maximum relative difference of its losses: {differs:.1e}")

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
    lines += block(where, ["recipe", "seconds by phase", *PHASES], [".4f"] * len(PHASES))
    lines += block(compared, ["recipe", "ratio", "median", "95 % from", "to"], [".3f"] * 3)
    if fed:
        headers = ["recipe", "with its data loader", "workers", "loader alone, images/s", "images/s", "median s", "waiting s"]  # fmt: skip
        lines += block(fed, headers, [".0f", ".1f", ".2f", ".4f", ".4f"])
    return "\n".join(lines)
