"""Visualize elastic response selection: the locations where ERD compares student and teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..data import check_dataset
from ..data.datasets import sample_evenly
from ..losses import ERDLoss
from ..modeling import Teacher
from .panels import Scene, save_pictures, scenes, side_by_side, tag_old_new

TITLES = {"classes": "class logits", "boxes": "boxes", "kept": "boxes after NMS"}
"""Field of the selection -> title of its panel."""


def draw_selection(
    folder: Path,
    dataset: str,
    loss: ERDLoss,
    teacher: Teacher,
    mapper: Callable[[dict], dict],
    number: int,
) -> list[Path]:
    """Draw ground truth and selected locations for evenly spaced images of a data set.

    Each location is a dot, with one colour per level and a larger size on coarser levels.

    Args:
        folder: output folder.
        dataset: a registered data set.
        loss: an ERD loss that is set up for student and teacher.
        teacher: the teacher, a detector of the old classes.
        mapper: a dataset mapper for evaluation.
        number: number of images.

    Raises:
        InputError: if the data set is not registered, or an image cannot be read.
    """
    check_dataset(dataset)
    records = DatasetCatalog.get(dataset)
    names = MetadataCatalog.get(dataset).get("thing_classes")
    metadata = tag_old_new(names, *_old_and_new(loss, names or ()))
    drawn = {}
    for scene in scenes(sample_evenly(records, number), mapper):
        add_selection(scene, loss, teacher)
        drawn[scene.name] = side_by_side(scene.image, scene.panels, metadata)
    return save_pictures(folder, drawn)


def _old_and_new(loss: ERDLoss, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the student's classes that the teacher has, and the others. By default, the first ones are old."""
    known: Sequence[int] = range(loss.num_old_classes)
    names = names[: loss.num_classes]
    if loss.class_map is not None:
        names, known = loss.class_map.student, loss.class_map.student_ids
    old = [name for k, name in enumerate(names) if k in known]
    return old, [name for name in names if name not in old]


def add_selection(scene: Scene, loss: ERDLoss, teacher: Teacher) -> None:
    """Add a panel for each of :data:`TITLES`, with the number of locations in the title."""
    outputs = teacher.outputs(scene.batch)
    with torch.no_grad():
        selection = loss.select(outputs, loss.gather_predictions(outputs, "teacher"))
    height, width = scene.image.shape[:2]
    shown = scene.batch[0]["image"].shape[-2:]
    centers = Boxes.cat(outputs.anchors).get_centers().cpu()
    centers = centers * torch.tensor([width / shown[1], height / shown[0]])
    levels = torch.cat([torch.full((len(a),), i) for i, a in enumerate(outputs.anchors)])
    for name, title in TITLES.items():
        chosen: Tensor = getattr(selection, name)[0].cpu()
        panel = Instances((height, width), locations=centers[chosen], levels=levels[chosen])
        scene.panels[f"{title}: {int(chosen.sum())}"] = panel
