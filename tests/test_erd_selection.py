"""Pictures of old and new classes, and of the locations that ERD selects."""

import numpy as np
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.transforms import Resize
from detectron2.structures import Instances
from PIL import Image

from d2kd.structures.class_map import ClassMap
from d2kd.visualization import erd_selection
from d2kd.visualization.erd_selection import TITLES, draw_selection
from d2kd.visualization.panels import COLORS, panel_metadata, side_by_side

from .common import command
from .test_incremental import increment


def test_names_say_what_is_old():
    metadata = Metadata(thing_classes=["a", "b", "c"])
    student = ["b", "c"]  # of "a" it will learn in a later increment
    panels = panel_metadata(metadata, {"teacher": ["b"], "student": student, "stranger": None}, 1)
    assert {title: panel and panel.thing_classes for title, panel in panels.items()} == {
        "ground truth": ["a", "b (old)", "c (new)"],
        "teacher": ["b (old)"],
        "student": ["b (old)", "c (new)"],
        "stranger": None,
    }
    panels = panel_metadata(metadata, {"student": student})
    assert [panel.thing_classes for panel in panels.values()] == [["a", "b", "c"], ["b", "c"]]
    assert panel_metadata(Metadata(), {"student": None}, 1)["ground truth"] is None


def test_locations_are_dots_in_their_places():
    image = np.full((500, 600, 3), 7, np.uint8)
    places, levels = torch.tensor([[100.0, 50.0], [400.0, 300.0]]), torch.tensor([0, 2])
    dots = Instances((500, 600), locations=places, levels=levels)
    drawn = side_by_side(image, {"here": dots})[-500:]
    assert drawn[50, 100].tolist() == COLORS[0].tolist()
    assert drawn[300, 400].tolist() == COLORS[2].tolist()
    touched = (drawn != 7).any(axis=2)
    assert touched[40:61, 90:111].sum() < touched[290:311, 390:411].sum()
    assert touched.sum() == touched[40:61, 90:111].sum() + touched[290:311, 390:411].sum()


def test_the_selection_is_drawn(tmp_path, monkeypatch):
    config = increment(tmp_path)
    config.model.classes = ["class 0", "class 2", "class 1"]  # not the data set's order
    names = instantiate(config.dataloader.test.dataset.names)
    model = instantiate(config.model)
    shown, panels = [], []
    monkeypatch.setattr(
        erd_selection,
        "side_by_side",
        lambda *drawn: shown.append(drawn[2]) or panels.append(drawn[1]) or side_by_side(*drawn),
    )
    config.dataloader.test.mapper.augmentations = [L(Resize)(shape=(128, 256))]
    mapper = instantiate(config.dataloader.test.mapper)
    loss = model.losses.by_name["erd"]
    assert len(TITLES) == 3 and MetadataCatalog.get(names).thing_classes
    written = draw_selection(tmp_path / "pictures", names, loss, model.teacher, mapper, 2)
    assert len(written) == 2
    assert Image.open(written[0]).size[0] > 4 * 480
    # In the picture's pixels, whatever size the detectors were shown.
    chosen = [one.locations for panel in panels for one in panel.values() if one.has("locations")]
    assert 32 < torch.cat(chosen).max() < 64
    assert shown[0].thing_classes == ["class 0 (old)", "class 1 (new)", "class 2 (new)"]
    # A class of an increment to come is neither.
    loss.class_map = ClassMap.from_names(["class 2", "class 0"], ["class 0"])
    draw_selection(tmp_path / "pictures", names, loss, model.teacher, mapper, 1)
    assert shown[-1].thing_classes == ["class 0 (old)", "class 1", "class 2 (new)"]
    loss.class_map, loss.num_classes = None, 2
    draw_selection(tmp_path / "pictures", names, loss, model.teacher, mapper, 1)
    assert shown[-1].thing_classes == ["class 0 (old)", "class 1 (new)", "class 2"]


def test_the_command_line(tmp_path, capsys):
    increment(tmp_path)  # its data, and the old detector
    text = "from tests.test_incremental import increment\nglobals().update(increment(Path(__file__).parent))"
    (tmp_path / "recipe.py").write_text("from pathlib import Path\n" + text)
    words = ["--what", "selection", "--output", tmp_path / "pictures", "--number", "2"]
    named = ["--config-file", tmp_path / "recipe.py", "--dataset", f"tiny_{tmp_path / 'data'}"]
    command("visualize")([*words, *named])
    assert "selected locations: 2 pictures" in capsys.readouterr().out
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 2
