"""The comparison report at the end of a study, and of ``d2kd compare``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from ..comparison.comparison import Options, compare
from ..comparison.detections import Report
from ..comparison.detectors import Data, Detector, detectors_of_study, load_data
from ..report.page import write_report
from ..utils.console import Progress, quiet
from ..utils.errors import InputError
from .plan import Study

KEPT = "comparison"
"""Folder beside the page: detections and counts, for another time."""
OBSERVED, PICTURES = 16, 4
"""Images whose regions and features a study's report tells, and images it shows: a study has other things to spend its
time on."""


def compare_and_report(
    detectors: Sequence[Detector],
    data: Data,
    output: Path,
    options: Options | None = None,
    console: TextIO | None = None,
) -> Path:
    """Compare detectors, showing progress, and write the page; returns its path.

    Raises:
        InputError: see :func:`.compare`.
    """
    console = console or sys.stdout

    def phase(what: str) -> Report:
        line = Progress(f"  {what:<24}", console)

        def report(step: int, steps: int) -> None:
            line(step, steps)
            if step == steps:
                line.close(f"step {step}/{steps}")

        return report

    with quiet():
        comparison = compare(detectors, data, output / KEPT, options, phase)
        page = write_report(comparison, output)
    for note in comparison.notes:
        console.write(f"  {note}\n")
    return page


def study_report(output: Path, study: Study, rows: Sequence[Mapping[str, Any]]) -> Path | None:
    """``report.html`` of a study: its teacher, its baseline and the student it is about, under one seed.

    Args:
        output: the study's folder.
        study: what was asked.
        rows: of ``results.json``.

    Returns:
        the page, or None where there is nothing to compare: classes are learned in steps, or no run was distilled.
    """
    if study.steps:
        return None
    try:
        detectors = detectors_of_study(output, rows, study.baseline, study.featured)
    except InputError:
        return None
    return compare_and_report(
        detectors, load_data(study.test), output, Options(observed=OBSERVED, pictures=PICTURES)
    )
