"""The comparison report of several detectors, with progress output."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from tabulate import tabulate

from ..comparison.comparison import Comparison, Options, compare
from ..comparison.detectors import Detector, EvaluationData
from ..utils.console import ProgressBar, ProgressCallback, suppress_output
from .page import summary_sentence, write_report

CACHE = "comparison"
"""Folder beside the page with cached detections and counts."""


def compare_and_report(
    detectors: Sequence[Detector],
    data: EvaluationData,
    output: Path,
    options: Options | None = None,
    console: TextIO | None = None,
) -> Path:
    """Compare detectors with progress output, write the report, print its main figures, and return the path of the page.

    Raises:
        InputError: see :func:`.compare`.
    """
    console = console or sys.stdout

    def phase(what: str) -> ProgressCallback:
        line = ProgressBar(f"  {what:<24}", console)

        def update(done: int, total: int) -> None:
            line(done, total)
            if done == total:
                line.close(f"{done}/{total}")

        return update

    with suppress_output():
        comparison = compare(detectors, data, output / CACHE, options, phase)
        page = write_report(comparison, output)
    for note in comparison.notes:
        console.write(f"  {note}\n")
    console.write(f"\n{format_main_figures(comparison)}\n")
    return page


def format_main_figures(comparison: Comparison) -> str:
    """Return AP and AP50 of each detector and its AP above the baseline's, as a table, and the page's summary."""
    rows, masks = [], ["mask AP"] * any(one.mask_accuracy for one in comparison.detectors)
    for one in comparison.detectors:
        values = [one.accuracy.metrics[key] for key in ("AP", "AP50")]
        values += [one.mask_accuracy and one.mask_accuracy.metrics["AP"] for _ in masks]
        found = comparison.gain(one.name, comparison.baseline)
        gain = {"gain": None, "interval": None} if found is None else found.metrics["AP"]
        text = "" if gain["gain"] is None else f"{gain['gain']:+.1f}"
        if gain["interval"] is not None:
            text += " ({:+.1f} to {:+.1f})".format(*gain["interval"])
        rows.append([one.name, *("-" if x is None else f"{x:.1f}" for x in values), text])
    heading = ["detector", "AP", "AP50", *masks, f"AP above {comparison.baseline} (95 %)"]
    table = tabulate(
        rows,
        heading,
        "simple",
        disable_numparse=True,
        colalign=["left"] + ["right"] * (3 + len(masks)),
    )
    return f"{table}\n\n{summary_sentence(comparison)}"
