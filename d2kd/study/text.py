"""Figures as text."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def mean_text(values: Sequence[float | None], digits: int) -> str:
    """The mean of what is defined, and its deviation if there are several."""
    defined = [value for value in values if value is not None]
    if not defined:
        return "-"
    text = f"{statistics.fmean(defined):.{digits}f}"
    return text + (f" ±{statistics.stdev(defined):.{digits}f}" if len(defined) > 1 else "")


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns, the first flush left and the others flush right, under a ruled heading."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = [
        "  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])])
        for first, *rest in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])
