"""The comparison report of a study and of ``d2kd compare``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from ..comparison.comparison import Options, compare
from ..comparison.detectors import Detector, EvaluationData, detectors_from_study, load_data
from ..report.page import write_report
from ..utils.console import ProgressBar, ProgressCallback, suppress_output
from ..utils.errors import InputError
from .plan import Study

CACHE = "comparison"
"""Folder beside the page with cached detections and counts."""
OBSERVED, PICTURES = 16, 4
"""Number of images in a study's report for regions and features, and in its gallery; few, to keep it fast."""


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

        def report(step: int, steps: int) -> None:
            line(step, steps)
            if step == steps:
                line.close(f"step {step}/{steps}")

        return report

    with suppress_output():
        comparison = compare(detectors, data, output / CACHE, options, phase)
        page = write_report(comparison, output)
    for note in comparison.notes:
        console.write(f"  {note}\n")
    return page


def study_report(output: Path, study: Study, rows: Sequence[Mapping[str, Any]]) -> Path | None:
    """Write ``report.html`` of a study, which compares teacher, baseline and featured student of one seed.

    Args:
        output: the study's folder.
        study: the study.
        rows: ``rows`` of ``results.json``.

    Returns:
        path of the page; None for a class-incremental study, or without a distilled run.
    """
    if study.increments:
        return None
    try:
        detectors = detectors_from_study(output, rows, study.baseline, study.featured)
    except InputError:
        return None
    return compare_and_report(
        detectors, load_data(study.test), output, Options(observed=OBSERVED, pictures=PICTURES)
    )
