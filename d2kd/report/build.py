"""The comparison report of several detectors, with progress output."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from ..comparison.comparison import Options, compare
from ..comparison.detectors import Detector, EvaluationData
from ..utils.console import ProgressBar, ProgressCallback, suppress_output
from .page import write_report

CACHE = "comparison"
"""Folder beside the page with cached detections and counts."""


def compare_and_report(
    detectors: Sequence[Detector],
    data: EvaluationData,
    output: Path,
    options: Options | None = None,
    console: TextIO | None = None,
) -> Path:
    """Compare detectors with progress output, write the report, and return the path of the page.

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
    return page
