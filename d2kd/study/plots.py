"""Plot of the gains of a study."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..visualization.text import literal_text, one_line


def draw_gains(path: Path, over: Mapping[str, Mapping[str, Mapping[str, Any]]], title: str) -> None:
    """Plot the gains of each method: single seeds, mean and 95 % interval. Each reference has its own panel.

    Args:
        path: image file to write.
        over: reference -> method -> result of :func:`d2kd.study.results.gains`.
        title: title of the figure.
    """
    from matplotlib.figure import Figure

    over = {reference: found for reference, found in over.items() if found}
    methods = list(dict.fromkeys(method for found in over.values() for method in found))
    height = 1.4 + 0.42 * len(methods)
    with literal_text():
        figure = Figure(figsize=(3.2 + 2.6 * len(over), height), layout="constrained")
        panels = figure.subplots(1, len(over), sharey=True, squeeze=False)[0]
        for panel, (reference, found) in zip(panels, over.items()):
            panel.axvline(0, color="0.6", linewidth=1)
            for row, method in enumerate(methods):
                gain = found.get(method)
                if gain is None or gain["mean_gain"] is None:
                    continue
                color = f"C{row}"
                if gain["interval"] is not None:
                    panel.plot(gain["interval"], [row, row], color=color, alpha=0.35, linewidth=5)
                each = [value for value in gain["gains"] if value is not None]
                panel.plot(each, [row] * len(each), "o", color=color, markersize=4, alpha=0.8)
                panel.plot([gain["mean_gain"]], [row], "|", color=color, markersize=16)
            panel.set_title(f"over {one_line(reference)}", fontsize=9)
            panel.set_xlabel("gain in AP", fontsize=9)
            panel.grid(axis="x", alpha=0.3)
        panels[0].set_yticks(range(len(methods)), map(one_line, methods))
        panels[0].set_ylim(len(methods) - 0.5, -0.5)
        figure.suptitle(one_line(title, 100), fontsize=10)
        figure.savefig(path, dpi=110)
