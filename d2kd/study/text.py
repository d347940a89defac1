"""Numbers and tables as text."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from tabulate import tabulate

# The 97.5th percentile of Student's t for 1 to 30 degrees of freedom. The last one is used beyond, at most 4 % too wide.
T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def format_mean(values: Sequence[float | None], digits: int) -> str:
    """Format the mean of the defined values, with the standard deviation if there are several."""
    defined = [value for value in values if value is not None]
    if not defined:
        return "-"
    text = f"{statistics.fmean(defined):.{digits}f}"
    return text + (f" ±{statistics.stdev(defined):.{digits}f}" if len(defined) > 1 else "")


def format_text_table(lines: Sequence[Sequence[str]]) -> str:
    """Format a plain-text table, with the first column left-aligned and the others right-aligned."""
    return _tabulated(lines, "simple", preserve_whitespace=True)


def format_markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Format a markdown table; the first row is the heading."""
    return _tabulated(lines, "pipe")


def _tabulated(lines: Sequence[Sequence[str]], style: str, **options: bool) -> str:
    heading, *rows = lines
    sides = ["left"] + ["right"] * (len(heading) - 1)
    options |= {"disable_numparse": True, "colalign": sides if rows else None}
    return tabulate(rows, heading, style, **options)


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % confidence interval of the mean by Student's t; None for fewer than two values."""
    if len(values) < 2:
        return None
    t = T_975[min(len(values) - 1, len(T_975)) - 1]
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half
