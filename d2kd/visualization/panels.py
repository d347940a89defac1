"""Draw the detections of several detectors side by side: ground truth | teacher | student.

The training hook, studies and ``d2kd visualize`` all draw with :func:`side_by_side`. Other functions convert
dataset dicts and COCO results to :class:`Instances`, and select images in which two detectors differ.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.structures import Boxes, BoxMode, Instances, pairwise_iou
from PIL import Image, ImageDraw, ImageFont

from ..data import build_test_loader, check_dataset
from ..data.datasets import sample_evenly
from ..data.images import read_image
from ..structures.rle import object_array
from .text import literal_text, one_line

# Smaller images are enlarged to this shorter side, in pixels, so that the labels of an 8 px object are legible.
LEGIBLE_SIDE = 480
STRIP = 30  # height of the title strip
GAP = 6  # between two panels

# Ten colours that can be distinguished on textures and by most colour-blind people; class k has the same in all panels.
COLORS = np.array(
    [
        [230, 159, 0],
        [86, 180, 233],
        [0, 200, 130],
        [240, 228, 66],
        [255, 110, 60],
        [220, 130, 200],
        [120, 140, 255],
        [170, 220, 90],
        [255, 90, 120],
        [90, 230, 230],
    ]
)


def side_by_side(
    image: np.ndarray,
    panels: Mapping[str, Instances],
    metadata=None,
    threshold: float = 0.5,
    longest: int | None = None,
) -> np.ndarray:
    """Draw an image once per panel, each with its boxes and a title.

    Args:
        image: (H, W, 3) RGB, or gray as (H, W) or (H, W, 1); values in [0, 255] of any type.
        panels: title -> instances in pixels of ``image``: ``gt_boxes`` and ``gt_classes``, or ``pred_boxes``,
            ``pred_classes`` and ``scores``; or ``locations`` (R, 2) and their ``levels`` (R,), drawn as dots. Masks are
            drawn as outlines if there are predicted ones: ``pred_masks`` (R, H, W), ``pred_segmentations`` and
            ``gt_segmentations``, arrays of R polygons or RLE as in COCO files, None where there is none.
        metadata: metadata with ``thing_classes``; or a mapping title -> metadata, if detectors have different classes.
            The label of a class without a name is its index.
        threshold: minimum score of predictions. Ground truth is always drawn.
        longest: maximum size of the longer side of a panel, in pixels.

    Returns:
        (H', W', 3) uint8 RGB, the panels from left to right.
    """
    if not panels:
        raise ValueError("side_by_side needs at least one panel")
    image = _rgb(image)
    scale = max(1.0, LEGIBLE_SIDE / min(image.shape[:2]))
    if longest is not None:
        scale = min(scale, longest / max(image.shape[:2]))
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    # Enlarge by nearest neighbour, to show the pixels that the student was given.
    resampling = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
    scaled = np.asarray(Image.fromarray(image).resize((width, height), resampling))
    columns = []
    with_masks = any(x.has("pred_masks") or x.has("pred_segmentations") for x in panels.values())
    for title, instances in panels.items():
        own = metadata.get(title) if isinstance(metadata, dict) else metadata
        if columns:
            columns.append(np.full((height + STRIP, GAP, 3), 255, np.uint8))
        drawn = _draw(scaled, instances, own, threshold, scale, with_masks)
        columns.append(np.vstack([title_strip(title, width), drawn]))
    return np.hstack(columns)


def instances_from_annotations(
    annotations: Iterable[Mapping], image_size: tuple[int, int]
) -> Instances:
    """Convert the annotations of a dataset dict to instances, without crowd regions.

    Args:
        annotations: ``dataset_dict["annotations"]``.
        image_size: (height, width).
    """
    single = [a for a in annotations if not a.get("iscrowd", 0)]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in single]
    instances = Instances(tuple(image_size))
    instances.gt_boxes = Boxes(_matrix(boxes))
    instances.gt_classes = torch.tensor([a["category_id"] for a in single], dtype=torch.int64)
    # An array, which instances can index, unlike a list.
    instances.gt_segmentations = object_array([a.get("segmentation") for a in single])
    return instances


def instances_from_results(
    results: Iterable[Mapping], image_size: tuple[int, int], class_of: Mapping[int, int]
) -> Instances:
    """Convert the COCO results of one image to instances.

    Args:
        results: dicts with ``bbox`` (XYWH), ``score``, ``category_id`` and, of a detector with masks, ``segmentation``.
        image_size: (height, width).
        class_of: category id -> class index (``metadata.thing_dataset_id_to_contiguous_id``).
    """
    results = list(results)
    boxes = [BoxMode.convert(r["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS) for r in results]
    instances = Instances(tuple(image_size))
    instances.pred_boxes = Boxes(_matrix(boxes))
    instances.pred_classes = torch.tensor(
        [class_of[r["category_id"]] for r in results], dtype=torch.int64
    )
    instances.scores = torch.tensor([r["score"] for r in results], dtype=torch.float32)
    if any("segmentation" in r for r in results):
        instances.pred_segmentations = object_array([r.get("segmentation") for r in results])
    return instances


def mask_outlines(mask: Any, height: int, width: int) -> list[np.ndarray]:
    """Return the outlines (P, 2) of a mask, in pixels: pixels (H, W), polygons or an RLE. None of an empty mask."""
    # Imported here because matplotlib takes a second to import.
    from detectron2.utils.visualizer import GenericMask

    return [polygon.reshape(-1, 2) for polygon in GenericMask(mask, height, width).polygons]


def count_matched_objects(
    truth: Instances, predicted: Instances, threshold: float, iou: float = 0.5
) -> int:
    """Count the objects matched at IoU >= ``iou`` by a detection of their class, highest scores first."""
    order = predicted.scores.argsort(descending=True)
    predicted = predicted[order[predicted.scores[order] >= threshold]]
    overlap = pairwise_iou(truth.gt_boxes, predicted.pred_boxes)
    overlap *= truth.gt_classes[:, None] == predicted.pred_classes[None]
    count = 0
    for column in range(len(predicted)):
        if len(truth) and overlap[:, column].max() >= iou:
            overlap[overlap[:, column].argmax()] = -1  # an object is matched once
            count += 1
    return count


def draw_differences(
    folder: Path, dataset: str, results: Mapping[str, Path], number: int, threshold: float
) -> list[Path]:
    """Draw ground truth | … | baseline | student for the images in which the last two differ most.

    Images are ranked by the absolute difference between the numbers of objects that the two detectors find, see
    :func:`count_matched_objects`, so gains and losses are shown alike.

    Args:
        folder: output folder; pictures of an earlier call are deleted.
        dataset: a registered data set.
        results: title -> ``coco_instances_results.json`` of a detector; the last two are compared.
        number: number of images.
        threshold: minimum score of a detection, to be counted and drawn.
    """
    records = DatasetCatalog.get(dataset)  # first, because this adds category ids to the metadata
    metadata = MetadataCatalog.get(dataset)
    class_of = metadata.get("thing_dataset_id_to_contiguous_id")
    if class_of is None:  # COCOEvaluator then uses class indices as category ids
        class_of = {i: i for i in range(len(metadata.thing_classes))}
    by_image = {title: _by_image(path) for title, path in results.items()}
    scored = []
    for record in records:
        size = (record["height"], record["width"])
        truth = instances_from_annotations(record.get("annotations", ()), size)
        seen = {
            t: instances_from_results(rows.get(record["image_id"], ()), size, class_of)
            for t, rows in by_image.items()
        }
        found = {t: count_matched_objects(truth, p, threshold) for t, p in seen.items()}
        baseline, student = list(found.values())[-2:]
        scored.append((abs(student - baseline), record, truth, seen, found))
    scored.sort(key=lambda entry: -entry[0])  # stable: ties are in the data set's order

    for old in folder.glob("*.png"):
        old.unlink()
    drawn = {}
    for rank, (_, record, truth, seen, found) in enumerate(scored[:number], 1):
        panels = {f"ground truth: {len(truth)}": truth}
        panels |= {f"{title}: finds {found[title]}": p for title, p in seen.items()}
        image = read_image(record["file_name"], "RGB")
        name = f"{rank:02d}_{Path(record['file_name']).stem}"
        drawn[name] = side_by_side(image, panels, metadata, threshold)
    return save_pictures(folder, drawn)


def save_pictures(folder: Path, drawn: Mapping[str, np.ndarray]) -> list[Path]:
    """Write pictures, file name without suffix -> (H, W, 3), as PNG, and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in drawn.items():
        Image.fromarray(picture).save(folder / f"{name}.png")
    return [folder / f"{name}.png" for name in drawn]


def _by_image(path: Path) -> dict[Any, list[dict]]:
    rows: dict[Any, list[dict]] = {}
    for row in json.loads(path.read_text()) if path.is_file() else ():
        rows.setdefault(row["image_id"], []).append(row)
    return rows


@dataclass
class Scene:
    """An image and the panels to draw.

    Attributes:
        name: number of the scene and name of the image file, such as ``"01_000139"``.
        image: (H, W, 3) uint8 RGB.
        batch: the detectors' inputs, a list of one dict.
        panels: title -> instances in pixels of ``image``; ``"ground truth"`` is the first.
    """

    name: str
    image: np.ndarray
    batch: list[dict]
    panels: dict[str, Instances]

    def add(self, title: str, detector: Callable[[list[dict]], list[dict]]) -> None:
        """Add a panel with the outputs of a detector in eval mode, or of another function of batches."""
        with torch.no_grad():
            [output] = detector(self.batch)
        self.panels[title] = output["instances"].to("cpu")


def scenes(records: Sequence[dict], mapper: Callable[[dict], dict]) -> Iterator[Scene]:
    """Iterate over the images of dataset dicts, with their ground truth.

    Args:
        records: dataset dicts with annotations.
        mapper: a dataset mapper for evaluation.

    Raises:
        InputError: if there is no record, or an image cannot be read.
    """
    # Not split over processes: one may draw while the others train.
    loader = build_test_loader(records, mapper=mapper, sampler=range(len(records)))
    for number, (record, batch) in enumerate(zip(records, loader), 1):
        image = read_image(record["file_name"], "RGB")
        truth = instances_from_annotations(record.get("annotations", ()), image.shape[:2])
        name = f"{number:02d}_{Path(record['file_name']).stem}"
        yield Scene(name, image, batch, {"ground truth": truth})


def panel_metadata(
    metadata, classes: Mapping[str, Sequence[str] | None], num_old_classes: int = 0
) -> dict[str, Metadata | None]:
    """Return the metadata of each panel: of the data set for the ground truth, of the detector otherwise.

    Args:
        metadata: metadata of the data set.
        classes: title -> class names of the detector, or None to draw class indices.
        num_old_classes: number of the student's old classes, which are the first ones.
    """
    old: Sequence[str] = ()
    new: Sequence[str] = ()
    if num_old_classes:
        learned = classes.get("student") or ()
        old, new = learned[:num_old_classes], learned[num_old_classes:]
    lists = {"ground truth": metadata.get("thing_classes"), **classes}
    return {title: tag_old_new(names, old, new) for title, names in lists.items()}


def tag_old_new(
    names: Sequence[str] | None, old: Collection[str], new: Collection[str]
) -> Metadata | None:
    """Return metadata with "(old)" or "(new)" after the names of these classes; None if there are no names."""
    if not names:
        return None
    marks = dict.fromkeys(old, " (old)") | dict.fromkeys(new, " (new)")
    return Metadata(thing_classes=[f"{name}{marks.get(name, '')}" for name in names])


def draw_detections(
    folder: Path,
    dataset: str,
    detectors: Mapping[str, tuple[Callable[[list[dict]], list[dict]], Sequence[str] | None]],
    mapper: Callable[[dict], dict],
    number: int,
    threshold: float,
    num_old_classes: int = 0,
) -> list[Path]:
    """Draw ground truth and detections for evenly spaced images of a data set.

    Args:
        folder: output folder.
        dataset: a registered data set.
        detectors: title -> (detector in eval mode or other function of batches, class names as in :func:`panel_metadata`).
        mapper: a dataset mapper for evaluation.
        number: number of images.
        threshold: minimum score to draw.
        num_old_classes: see :func:`panel_metadata`.

    Raises:
        InputError: if the data set is not registered, or an image cannot be read.
    """
    check_dataset(dataset)
    records = DatasetCatalog.get(dataset)
    classes = {title: names for title, (_, names) in detectors.items()}
    metadata = panel_metadata(MetadataCatalog.get(dataset), classes, num_old_classes)
    drawn = {}
    for scene in scenes(sample_evenly(records, number), mapper):
        for title, (detector, _) in detectors.items():
            scene.add(title, detector)
        drawn[scene.name] = side_by_side(scene.image, scene.panels, metadata, threshold)
    return save_pictures(folder, drawn)


def _draw(
    image: np.ndarray,
    instances: Instances,
    metadata,
    threshold: float,
    scale: float,
    with_masks: bool = False,
) -> np.ndarray:
    """Draw the boxes of ``instances``, and the outlines of their masks, scaled, on a copy of ``image``."""
    # Imported here because matplotlib takes a second to import, and the trainer imports this module.
    from detectron2.utils.visualizer import Visualizer

    instances = instances.to("cpu")
    if instances.has("locations"):
        return _dots(image, instances, scale)
    annotated = instances.has("gt_boxes")
    boxes = (instances.gt_boxes if annotated else instances.pred_boxes).tensor
    classes = (instances.gt_classes if annotated else instances.pred_classes).tolist()
    scores = [None] * len(classes)
    if not annotated and instances.has("scores"):
        scores = instances.scores.tolist()
    shown = [i for i, s in enumerate(scores) if s is None or s >= threshold]
    names = metadata.get("thing_classes") if metadata is not None else None
    boxes = boxes[shown].detach().numpy() * scale
    colors = [COLORS[classes[i] % len(COLORS)] / 255 for i in shown]
    labels = [_label(classes[i], scores[i], names) for i in shown]
    with literal_text():
        visualizer = Visualizer(image)
        # overlay_instances alone draws boxes half transparent, which is too faint on textures.
        for box, color in zip(boxes, colors):
            visualizer.draw_box(box, alpha=1.0, edge_color=color)
        masks = _masks(instances) if with_masks else {}
        for i, color in zip(shown, colors):
            if masks.get(i) is not None:
                for points in mask_outlines(masks[i], *instances.image_size):
                    visualizer.draw_polygon(points * scale, color, alpha=0.4)
        drawing = visualizer.overlay_instances(boxes=boxes, labels=labels, assigned_colors=colors)
        return drawing.get_image()


def _masks(instances: Instances) -> dict[int, Any]:
    """Return the masks of instances as Detectron2's ``GenericMask`` takes them, by index; empty without masks."""
    for name in ("pred_masks", "pred_segmentations", "gt_segmentations"):
        if instances.has(name):
            masks = instances.get(name)
            return dict(enumerate(masks.numpy() if name == "pred_masks" else masks))
    return {}


def _dots(image: np.ndarray, instances: Instances, scale: float) -> np.ndarray:
    """Draw locations as dots, with one colour and size per level."""
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    for (x, y), level in zip((instances.locations * scale).tolist(), instances.levels.tolist()):
        radius = 3 + 2 * level
        color = tuple(COLORS[level % len(COLORS)].tolist())
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], color, (0, 0, 0))
    return np.asarray(picture)


def _label(index: int, score: float | None, names: Sequence[str] | None) -> str:
    name = one_line(names[index]) if names and index < len(names) else f"class {index}"
    return name if score is None else f"{name} {score:.0%}"


def title_strip(title: str, width: int) -> np.ndarray:
    """Draw a title on a dark strip, in the largest font size that fits."""
    title = one_line(title, None)
    strip = Image.new("RGB", (width, STRIP), (32, 34, 40))
    draw = ImageDraw.Draw(strip)
    for size in (18, 16, 14, 12, 10, 8):
        font = ImageFont.load_default(size)
        if draw.textlength(title, font=font) <= width - 16:
            break
    draw.text((8, STRIP / 2), title, fill="white", font=font, anchor="lm")
    return np.asarray(strip)


def _rgb(image: np.ndarray) -> np.ndarray:
    image = np.asarray(image)
    if image.ndim == 2:
        image = image[:, :, None]
    if image.ndim != 3 or image.shape[2] not in (1, 3):
        raise ValueError(f"an image is (H, W), (H, W, 1) or (H, W, 3), not {image.shape}")
    if image.shape[2] == 1:
        image = image.repeat(3, axis=2)
    return np.ascontiguousarray(image.clip(0, 255).astype(np.uint8))


def _matrix(boxes: Sequence[Sequence[float]]) -> torch.Tensor:
    """Convert boxes to (N, 4), even if N is 0."""
    return torch.tensor(np.asarray(boxes, dtype=np.float32).reshape(-1, 4))
