"""The comparison report of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..comparison.comparison import Options
from ..comparison.detectors import detectors_from_study, load_data
from ..report.build import compare_and_report
from ..utils.errors import InputError
from .plan import Study

OBSERVED, PICTURES = 16, 4
"""Number of images in a study's report for regions and features, and in its gallery; few, to keep it fast."""


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
