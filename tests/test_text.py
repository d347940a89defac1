"""Names of any characters are drawn as they are: of classes, runs and studies."""

import json

import matplotlib.mathtext
import numpy as np
import pytest
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Boxes, Instances
from matplotlib.figure import Figure

from d2kd.report.pictures import _draw, _Mark
from d2kd.study.plots import draw_gains
from d2kd.visualization.curves import draw_curves
from d2kd.visualization.panels import side_by_side
from d2kd.visualization.text import LONGEST, one_line

NAMES = ["$10", "$5-$10", "$x$", "$\\foo$", "$\\frac$ $", "a_b^c", "\\alpha", "\\$5", "100%", "%s"]
NAMES += [
    "干净",
    "🙂",
    "العربية",
    "a\nb",
    "a\tb",
    "a\0b",
    "\ud800",
    "",
    " ",
    "_own",
    "x" * 300,
    "{a}",
]
# Each is like one of the others.
SELDOM = ["$10", "$5-$10", "$\\foo$", "\\$5", "%s", "العربية", "a\tb", " "]
assert {*SELDOM} < {*NAMES}


@pytest.fixture
def drawn(monkeypatch):
    """Formulas are an error; figures that are saved are kept."""
    figures = []
    monkeypatch.setattr(matplotlib.mathtext.MathTextParser, "parse", lambda *_, **__: 1 / 0)
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: figures.append(f) or save(f, *a, **k))
    return figures


def has(name: str) -> Instances:
    instances = Instances((64, 96), pred_boxes=Boxes(torch.tensor([[5.0, 5.0, 40.0, 40.0]])))
    instances.pred_classes, instances.scores = torch.tensor([0]), torch.tensor([0.9])
    return instances


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[pytest.mark.sweep] * (x in SELDOM)) for x in NAMES],
    ids=ascii,
)
def test_a_name_is_drawn(tmp_path, drawn, name):
    image = np.zeros((64, 96, 3), np.uint8)
    picture = side_by_side(image, {name: has(name)}, Metadata(thing_classes=[name]))
    assert picture.any() and _draw(
        image, [_Mark({"box": [5, 5, 40, 40]}, "#ffffff", text=name)], 560
    )
    rows = [{"iteration": k, "loss_cls": 1.0, "bbox/AP": 3.0} for k in range(2)]
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, rows)))
    draw_curves(tmp_path / "curves.png", {name: [tmp_path / "metrics.json"] * 2, "b": []}, name)
    result = {"mean_gain": 1.0, "interval": (0.0, 2.0), "gains": [1.0, 1.0]}
    draw_gains(tmp_path / "gains.png", {name: {name: result}}, name)
    curves, gains = drawn
    (entry,) = curves.axes[0].get_legend().get_texts()
    (tick,) = gains.axes[0].get_yticklabels()
    assert entry.get_text().strip() == tick.get_text() == one_line(name)
    assert curves.get_suptitle() == gains.get_suptitle() == one_line(name, 100)
    assert gains.axes[0].get_title() == f"over {one_line(name)}"


def test_one_line():
    for name in ("$10", "a_b^c", "干净", "🙂", "العربية", "\\alpha", "100%", "_own", "x" * LONGEST):
        assert one_line(name) == name
    assert one_line(" a\n\tb\0") == "a b" and one_line("\ud800a") == "?a" and one_line("") == ""
    assert one_line("x" * 99) == "x" * (LONGEST - 1) + "…" and one_line("x" * 99, None) == "x" * 99


def test_curves_of_runs_without_any(tmp_path, drawn):
    draw_curves(tmp_path / "curves.png", {}, "no run")
    assert (tmp_path / "curves.png").is_file()
