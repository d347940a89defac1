"""Ground truth | teacher | student: what several detectors see in one image, side by side.

One function draws, :func:`side_by_side`; the training hook, the study and ``d2kd visualize`` call it with
whatever panels they have. Around it: what turns Detectron2's records (dataset dicts, COCO results) into the
:class:`Instances` it draws, the choice of images in which two detectors differ, and the curves of runs.
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
from detectron2.data.detection_utils import read_image
from detectron2.structures import Boxes, BoxMode, Instances, pairwise_iou
from PIL import Image, ImageDraw, ImageFont

from ..data import build_test_loader, check_dataset
from ..data.datasets import spread

# Shorter side of a panel, in pixels: below it the labels of an 8 px object cannot be read. Larger images stay as they are.
LEGIBLE_SIDE = 480
STRIP = 30  # height of the title strip
GAP = 6  # between two panels

# Ten hues that stay apart on textures and for most colour-blind eyes; class k has the same in every panel.
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
    """Draw the same image once per panel, each with its own boxes and a title strip.

    Args:
        image: (H, W, 3) RGB, or gray as (H, W) or (H, W, 1); uint8, or anything whose values are in 0..255.
        panels: title -> instances in pixels of ``image``: ``gt_boxes`` and ``gt_classes``, or ``pred_boxes``,
            ``pred_classes`` and ``scores``; or ``locations`` (R, 2) and their ``levels`` (R,), drawn as dots.
        metadata: Detectron2's metadata of the data set, for ``thing_classes``; or a mapping title -> metadata where a
            detector has a class list of its own. A class without a name is drawn as its number.
        threshold: predictions below this score are left out; ground truth has no score and is always drawn.
        longest: side of a panel, in pixels, to which larger ones are shrunk.

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
    # Nearest for what is enlarged: the student was shown these pixels, not smooth ones.
    resampling = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
    scaled = np.asarray(Image.fromarray(image).resize((width, height), resampling))
    columns = []
    for title, instances in panels.items():
        own = metadata.get(title) if isinstance(metadata, dict) else metadata
        if columns:
            columns.append(np.full((height + STRIP, GAP, 3), 255, np.uint8))
        columns.append(
            np.vstack([title_strip(title, width), _draw(scaled, instances, own, threshold, scale)])
        )
    return np.hstack(columns)


def ground_truth(annotations: Iterable[Mapping], image_size: tuple[int, int]) -> Instances:
    """The annotations of a dataset dict as instances; crowd regions are no single object and are left out.

    Args:
        annotations: ``dataset_dict["annotations"]``.
        image_size: (height, width).
    """
    single = [a for a in annotations if not a.get("iscrowd", 0)]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in single]
    instances = Instances(tuple(image_size))
    instances.gt_boxes = Boxes(_matrix(boxes))
    instances.gt_classes = torch.tensor([a["category_id"] for a in single], dtype=torch.int64)
    return instances


def predictions(
    results: Iterable[Mapping], image_size: tuple[int, int], class_of: Mapping[int, int]
) -> Instances:
    """The rows of one image in a COCO results file as instances.

    Args:
        results: dicts with ``bbox`` (XYWH), ``score`` and ``category_id``.
        image_size: (height, width).
        class_of: category id -> contiguous class (``metadata.thing_dataset_id_to_contiguous_id``).
    """
    results = list(results)
    boxes = [BoxMode.convert(r["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS) for r in results]
    instances = Instances(tuple(image_size))
    instances.pred_boxes = Boxes(_matrix(boxes))
    instances.pred_classes = torch.tensor(
        [class_of[r["category_id"]] for r in results], dtype=torch.int64
    )
    instances.scores = torch.tensor([r["score"] for r in results], dtype=torch.float32)
    return instances


def found_objects(
    truth: Instances, predicted: Instances, threshold: float, iou: float = 0.5
) -> int:
    """How many objects are found: matched at IoU >= ``iou`` by a detection of their class, best scores first."""
    order = predicted.scores.argsort(descending=True)
    predicted = predicted[order[predicted.scores[order] >= threshold]]
    overlap = pairwise_iou(truth.gt_boxes, predicted.pred_boxes)
    overlap *= truth.gt_classes[:, None] == predicted.pred_classes[None]
    count = 0
    for column in range(len(predicted)):
        if len(truth) and overlap[:, column].max() >= iou:
            overlap[overlap[:, column].argmax()] = -1  # an object is found once
            count += 1
    return count


def draw_differences(
    folder: Path, dataset: str, results: Mapping[str, Path], number: int, threshold: float
) -> list[Path]:
    """Ground truth | … | baseline | student for the images in which the last two differ most.

    An image's score is the difference between the numbers of objects the two find (:func:`found_objects`),
    *whichever finds more*: losses belong in the pictures as much as gains.

    Args:
        folder: where to write them; pictures of an earlier call go.
        dataset: a registered data set.
        results: title -> ``coco_instances_results.json`` of that detector, the last two being those compared.
        number: of images.
        threshold: score from which a detection counts, and is drawn.
    """
    records = DatasetCatalog.get(dataset)  # first: loading tells the metadata its category ids
    metadata = MetadataCatalog.get(dataset)
    class_of = metadata.get("thing_dataset_id_to_contiguous_id")
    if class_of is None:  # COCOEvaluator then numbers categories as classes
        class_of = {i: i for i in range(len(metadata.thing_classes))}
    by_image = {title: _by_image(path) for title, path in results.items()}
    scored = []
    for record in records:
        size = (record["height"], record["width"])
        truth = ground_truth(record.get("annotations", ()), size)
        seen = {
            t: predictions(rows.get(record["image_id"], ()), size, class_of)
            for t, rows in by_image.items()
        }
        found = {t: found_objects(truth, p, threshold) for t, p in seen.items()}
        baseline, student = list(found.values())[-2:]
        scored.append((abs(student - baseline), record, truth, seen, found))
    scored.sort(key=lambda entry: -entry[0])  # stable: ties stay in the data set's order

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
    """Write pictures (H, W, 3) as PNG, by name without its suffix; returns the files."""
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
    """An image to be drawn, and its panels so far.

    Attributes:
        name: its place among the scenes and its file's name, such as ``"01_000139"``.
        image: (H, W, 3) uint8 RGB.
        batch: what detectors are given of it, a list of one dict.
        panels: title -> instances in pixels of ``image``; ``"ground truth"`` comes first.
    """

    name: str
    image: np.ndarray
    batch: list[dict]
    panels: dict[str, Instances]

    def add(self, title: str, detector: Callable[[list[dict]], list[dict]]) -> None:
        """Add the panel of what a detector in ``eval()``, or another function of batches, sees."""
        with torch.no_grad():
            [seen] = detector(self.batch)
        self.panels[title] = seen["instances"].to("cpu")


def scenes(records: Sequence[dict], mapper: Callable[[dict], dict]) -> Iterator[Scene]:
    """The images of dataset dicts, with their ground truth.

    Args:
        records: the dataset dicts, whose annotations are the ground truth.
        mapper: makes an input of a dataset dict, as for evaluation.

    Raises:
        InputError: there is no record, or an image cannot be read.
    """
    # All of them in whatever process: one may draw while the others train.
    loader = build_test_loader(records, mapper=mapper, sampler=range(len(records)))
    for number, (record, batch) in enumerate(zip(records, loader), 1):
        image = read_image(record["file_name"], "RGB")
        truth = ground_truth(record.get("annotations", ()), image.shape[:2])
        name = f"{number:02d}_{Path(record['file_name']).stem}"
        yield Scene(name, image, batch, {"ground truth": truth})


def described(
    metadata, classes: Mapping[str, Sequence[str] | None], num_old_classes: int = 0
) -> dict[str, Metadata | None]:
    """Metadata by panel: the data set's for the ground truth, for each detector its own.

    Args:
        metadata: the data set's.
        classes: a detector's title -> names in its order; None where nothing tells them, and numbers are drawn.
        num_old_classes: of the student's, the first ones, which its teacher has, too.
    """
    old: Sequence[str] = ()
    new: Sequence[str] = ()
    if num_old_classes:
        learned = classes.get("student") or ()
        old, new = learned[:num_old_classes], learned[num_old_classes:]
    lists = {"ground truth": metadata.get("thing_classes"), **classes}
    return {title: marked(names, old, new) for title, names in lists.items()}


def marked(
    names: Sequence[str] | None, old: Collection[str], new: Collection[str]
) -> Metadata | None:
    """Metadata with "old" or "new" after the classes that a student learns in steps; None where there are no names."""
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
    """Ground truth and what detectors see, for images spread evenly over a data set.

    Args:
        folder: where to write them.
        dataset: a registered data set.
        detectors: title -> a function of batches, such as a detector in ``eval()``, and the names of its classes, see
            :func:`described`.
        mapper: makes an input of a dataset dict, as for evaluation.
        number: of images.
        threshold: lowest score to draw.
        num_old_classes: see :func:`described`.

    Raises:
        InputError: the data set is not registered, or an image cannot be read.
    """
    check_dataset(dataset)
    records = DatasetCatalog.get(dataset)
    classes = {title: names for title, (_, names) in detectors.items()}
    metadata = described(MetadataCatalog.get(dataset), classes, num_old_classes)
    drawn = {}
    for scene in scenes(spread(records, number), mapper):
        for title, (see, _) in detectors.items():
            scene.add(title, see)
        drawn[scene.name] = side_by_side(scene.image, scene.panels, metadata, threshold)
    return save_pictures(folder, drawn)


def _draw(
    image: np.ndarray, instances: Instances, metadata, threshold: float, scale: float
) -> np.ndarray:
    """One panel: boxes of ``instances``, scaled, on ``image``."""
    # Late: it brings matplotlib, which takes a second, and the trainer imports this module.
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
    visualizer = Visualizer(image)
    # overlay_instances alone draws them half transparent: too faint on textures.
    for box, color in zip(boxes, colors):
        visualizer.draw_box(box, alpha=1.0, edge_color=color)
    labels = [_label(classes[i], scores[i], names) for i in shown]
    drawing = visualizer.overlay_instances(boxes=boxes, labels=labels, assigned_colors=colors)
    return drawing.get_image()


def _dots(image: np.ndarray, instances: Instances, scale: float) -> np.ndarray:
    """Locations on the image, from fine to coarse levels in other colours and sizes."""
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    for (x, y), level in zip((instances.locations * scale).tolist(), instances.levels.tolist()):
        radius = 3 + 2 * level
        color = tuple(COLORS[level % len(COLORS)].tolist())
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], color, (0, 0, 0))
    return np.asarray(picture)


def _label(index: int, score: float | None, names: Sequence[str] | None) -> str:
    name = names[index] if names and index < len(names) else f"class {index}"
    return name if score is None else f"{name} {score:.0%}"


def title_strip(title: str, width: int) -> np.ndarray:
    """The title on a dark strip, in the largest size that fits."""
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
    """(N, 4), also where N is 0."""
    return torch.tensor(np.asarray(boxes, dtype=np.float32).reshape(-1, 4))
