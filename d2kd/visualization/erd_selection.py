"""Pictures of elastic selection: the locations where ERD compares a student with the old detector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..data import check_dataset
from ..data.datasets import spread
from ..losses import ERDLoss
from ..modeling import Teacher
from .panels import Scene, marked, save_pictures, scenes, side_by_side

TITLES = {"classes": "class logits", "boxes": "boxes", "kept": "boxes after NMS"}
"""What is selected, as the pictures call it."""


def draw_selection(
    folder: Path,
    dataset: str,
    loss: ERDLoss,
    teacher: Teacher,
    mapper: Callable[[dict], dict],
    number: int,
) -> list[Path]:
    """Ground truth and the selected locations, for images spread evenly over a data set.

    A location is a dot, in a colour for each level and larger on coarser ones.

    Args:
        folder: where to write them.
        dataset: a registered data set.
        loss: that was bound to student and teacher.
        teacher: the old detector.
        mapper: makes an input of a dataset dict, as for evaluation.
        number: of images.

    Raises:
        InputError: the data set is not registered, or an image cannot be read.
    """
    check_dataset(dataset)
    records = DatasetCatalog.get(dataset)
    names = MetadataCatalog.get(dataset).get("thing_classes")
    metadata = marked(names, *_old_and_new(loss, names or ()))
    drawn = {}
    for scene in scenes(spread(records, number), mapper):
        add_selection(scene, loss, teacher)
        drawn[scene.name] = side_by_side(scene.image, scene.panels, metadata)
    return save_pictures(folder, drawn)


def _old_and_new(loss: ERDLoss, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The student's classes that the teacher knows, and the others; without names it has the data set's first ones."""
    known: Sequence[int] = range(loss.num_old_classes)
    names = names[: loss.num_classes]
    if loss.class_map is not None:
        names, known = loss.class_map.student, loss.class_map.of_student
    old = [name for k, name in enumerate(names) if k in known]
    return old, [name for name in names if name not in old]


def add_selection(scene: Scene, loss: ERDLoss, teacher: Teacher) -> None:
    """Add a panel for each of :data:`TITLES`, with the number of locations in its title."""
    outputs = teacher.ask(scene.batch)
    with torch.no_grad():
        selection = loss.select(outputs, loss.answer(outputs, "of_teacher"))
    height, width = scene.image.shape[:2]
    shown = scene.batch[0]["image"].shape[-2:]
    centers = Boxes.cat(outputs.anchors).get_centers().cpu()
    centers = centers * torch.tensor([width / shown[1], height / shown[0]])
    levels = torch.cat([torch.full((len(a),), i) for i, a in enumerate(outputs.anchors)])
    for name, title in TITLES.items():
        chosen: Tensor = getattr(selection, name)[0].cpu()
        panel = Instances((height, width), locations=centers[chosen], levels=levels[chosen])
        scene.panels[f"{title}: {int(chosen.sum())}"] = panel
