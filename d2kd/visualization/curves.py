"""Plots of losses and AP over the iterations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..utils.io import read_metrics
from .text import literal_text, one_line


def task_loss(entry: Mapping[str, float]) -> float | None:
    """Return the sum of the task losses in a line of metrics.json, which all methods have."""
    own = [value for key, value in entry.items() if key.startswith("loss_")]
    return sum(own) if own else None


def draw_curves(path: Path, metrics: Mapping[str, Sequence[Path]], title: str) -> None:
    """Plot task loss and validation AP over the iterations; of a detector with masks also mask AP, dashed.

    Args:
        path: file to write.
        metrics: method -> ``metrics.json`` of each of its runs; one colour per method, one line per run.
        title: title of the figure.
    """
    from matplotlib.figure import Figure

    with literal_text():
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        loss, ap = figure.subplots(1, 2)
        lines = {}  # one for each method
        for index, (method, paths) in enumerate(metrics.items()):
            style = {"color": f"C{index}", "alpha": 1.0 if len(paths) == 1 else 0.6}
            for entries in map(read_metrics, paths):
                losses = {e["iteration"] + 1: task_loss(e) for e in entries}
                losses = {x: y for x, y in losses.items() if y is not None}
                # The evaluation at the end is logged one iteration after the last step.
                last = max(losses, default=0)
                (line,) = loss.plot(losses.keys(), losses.values(), **style)
                lines.setdefault(method, line)
                for key, dashes in (("bbox/AP", "-"), ("segm/AP", "--")):
                    measured = {min(e["iteration"] + 1, last): e.get(key) for e in entries}
                    measured = {x: y for x, y in measured.items() if y is not None}
                    if measured or key == "bbox/AP":
                        points = {"marker": "o", "markersize": 3, "linestyle": dashes}
                        ap.plot(measured.keys(), measured.values(), **points, **style)
        loss.set(title="the student's task losses, distillation terms left out", ylabel="loss")
        ap.set(title="AP on the validation split", ylabel="AP")
        for axes in (loss, ap):
            axes.set_xlabel("iterations")
            axes.grid(alpha=0.3)
        # matplotlib leaves out a label that begins with "_".
        names = [" " * name.startswith("_") + one_line(name) for name in lines]
        loss.legend(lines.values(), names, frameon=False)
        figure.suptitle(one_line(title, 100))
        figure.savefig(path, dpi=110)
