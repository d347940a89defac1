"""Visualize the attention of ICD's decoder over the teacher's feature pyramid, for each object.

Notation: K: objects of an image; R: rows, the heads of all layers of the decoder; (H, W): cells of a level.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from omegaconf import DictConfig, OmegaConf
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from ..config import has_target
from ..data import InstancePriors, check_dataset
from ..data.datasets import sample_evenly
from ..layers.adapter import resize_map
from ..layers.attention import CellPositions
from ..layers.masks import valid_cells
from ..layers.queries import make_queries
from ..losses import ICDLoss
from ..losses.icd import flatten_maps
from ..modeling import Teacher
from ..modeling.weights import load_checkpoint, load_state_dict_checked
from ..structures.class_map import num_classes_of
from ..utils.errors import InputError
from .panels import GAP, save_pictures, scenes, title_strip

TILE = 160  # longer side of each image in a panel, in pixels
HEAT = np.array([255, 190, 0])


def load_icd(model: DictConfig, student: nn.Module, teacher: Teacher, weights: str) -> ICDLoss:
    """Build a recipe's ICD loss and load its weights from a checkpoint.

    Args:
        model: the recipe's ``model`` node.
        student, teacher: the models of the recipe. The student's weights are not used.
        weights: a checkpoint of the run, such as ``model_final.pth``, which includes the weights of the losses.

    Raises:
        InputError: if the recipe has no ICD loss, or the checkpoint has none or a different one.
    """
    named = [
        name
        for name, node in model.get("losses", {}).items()
        if OmegaConf.is_dict(node) and has_target(node, ICDLoss)
    ]
    if not named:
        raise InputError("model.losses", "no ICDLoss", "a recipe that distils by ICD")
    node = copy.deepcopy(model.losses[named[0]])
    node.priors = None
    loss = instantiate(node)
    # The priors are not used, because no negatives are sampled here.
    loss.priors = InstancePriors.uniform(num_classes_of(student))
    loss.scale = teacher.scale
    loss.setup(student, teacher.detector)
    prefix = f"by_name.{named[0]}."
    state = load_checkpoint(weights).get("losses")
    state = state if isinstance(state, Mapping) else {}  # of another tool
    learned = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if not learned:
        expected = "a checkpoint of a run with ICD, which holds its decoder"
        raise InputError(weights, f"no losses.{named[0]}", expected)
    load_state_dict_checked(loss, {"model": learned}, weights)
    return loss


@dataclass(frozen=True)
class Attention:
    """The decoder's attention weights for the objects of an image.

    Attributes:
        levels: level -> (K, R, H, W) weights. For each object and row, all levels together sum to 1.
        extent: padded height and width that the levels cover, in units of the image's; at least 1.
    """

    levels: dict[str, np.ndarray]
    extent: tuple[float, float]

    def object_attention(self, k: int) -> Attention:
        """Return the attention of object k, with K = 1."""
        return Attention({level: x[k : k + 1] for level, x in self.levels.items()}, self.extent)

    def level_fractions(self, k: int) -> dict[str, float]:
        """Return, for each level, the fraction of object k's attention, averaged over the rows."""
        return {level: float(x[k].sum((-1, -2)).mean()) for level, x in self.levels.items()}

    def fraction_inside(self, box: np.ndarray) -> np.ndarray:
        """Return the fraction of the attention inside a box, (K, R). Cells are weighted by the covered area.

        Args:
            box: XYXY, relative to the width and height of the image.
        """
        x0, y0, x1, y1 = box

        def covered(low: float, high: float, count: int, extent: float) -> np.ndarray:
            edges = np.arange(count + 1) / count * extent
            part = np.minimum(edges[1:], high) - np.maximum(edges[:-1], low)
            return part.clip(0) * count / extent

        height, width = self.extent
        return sum(
            np.einsum(
                "krhw,h,w->kr",
                cells,
                covered(y0, y1, cells.shape[-2], height),
                covered(x0, x1, cells.shape[-1], width),
            )
            for cells in self.levels.values()
        )

    def upsample(self, level: str, size: tuple[int, int]) -> np.ndarray:
        """Upsample a level to an image of ``size`` (height, width) by nearest neighbour: (K, R, *size)."""
        cells = self.levels[level]
        rows, columns = (
            ((np.arange(n) + 0.5) / n / covered * count).astype(int)
            for n, covered, count in zip(size, self.extent, cells.shape[-2:])
        )
        return cells[..., rows[:, None], columns]

    def density(self, size: tuple[int, int]) -> np.ndarray:
        """Return the attention per area, summed over levels: (K, R, *size), with a mean of at most 1."""
        height, width = self.extent
        return sum(
            self.upsample(level, size) * (cells.shape[-2] * cells.shape[-1] / height / width)
            for level, cells in self.levels.items()
        )


@dataclass(frozen=True)
class AttentionPictures:
    """The pictures, and how much attention is on the objects.

    Attributes:
        files: one picture per image.
        fraction_inside: fraction of an object's attention inside its box, averaged over objects and rows.
        by_chance: the same for uniform attention, which is the fraction of the image that a box covers.
    """

    files: list[Path]
    fraction_inside: float
    by_chance: float


@torch.no_grad()
def compute_attention(
    loss: ICDLoss, teacher: Teacher, batch: list[dict], truth: Instances
) -> Attention:
    """Compute the attention of an image's objects, with queries without jitter.

    Args:
        batch: a batch of one image, from the student's loader.
        truth: its objects, at least one: ``gt_boxes`` in pixels of ``truth.image_size``, and ``gt_classes``.

    Raises:
        InputError: if an object's class is not one of the student's.
    """
    outputs = teacher.outputs(batch)
    # Boxes in pixels of the student's image, as in training; the teacher's image may be larger.
    height, width = batch[0]["image"].shape[-2:]
    gt = Instances((height, width))
    gt.gt_boxes = Boxes(truth.gt_boxes.tensor.clone())
    gt.gt_boxes.scale(width / truth.image_size[1], height / truth.image_size[0])
    gt.gt_classes = truth.gt_classes
    image_size, padded = outputs.images.image_sizes[0], outputs.images.tensor.shape[-2:]
    strides = loss.level_strides
    if not any(map(strides.is_resized, strides.levels)):
        maps = {level: outputs.features[match].float() for level, match in loss.levels.items()}
    else:  # on the student's grid, as in training
        multiple = max(loss.strides.values())
        image_size = (height, width)
        padded = tuple(math.ceil(side / multiple) * multiple for side in image_size)
        shapes = teacher.detector.backbone.output_shape()
        maps = {
            level: resize_map(
                outputs.features[match].float(),
                shapes[match].stride,
                outputs.images.image_sizes,
                tuple(math.ceil(side / loss.strides[level]) for side in padded),
                loss.strides[level],
                [image_size],
            )
            for level, match in loss.levels.items()
        }
    cells, sizes = flatten_maps(maps.values()), [x.shape[-2:] for x in maps.values()]
    valid = valid_cells([image_size], padded, sizes, cells.device)
    positions = CellPositions.from_masks(valid, cells.shape[-1])
    valid = torch.cat([v.flatten(1) for v in valid], dim=1)
    queries = make_queries([gt], loss.priors, negatives_per_instance=0, jitter=0).to(cells.device)
    (x, query_positions), rows = loss.encode_queries(queries), []
    for layer in loss.decoder:
        rows.append(layer.logits(x, cells, positions, valid, query_positions)[0].softmax(-1))
        x = layer(x, cells, positions, valid, query_positions=query_positions).queries
    split = torch.cat(rows).transpose(0, 1).split([h * w for h, w in sizes], dim=-1)
    levels = {
        level: part.unflatten(-1, size).cpu().numpy()
        for level, part, size in zip(maps, split, sizes)
    }
    return Attention(levels, (padded[0] / image_size[0], padded[1] / image_size[1]))


def attention_panel(
    image: np.ndarray, attention: Attention, box: np.ndarray, title: str
) -> np.ndarray:
    """Draw the attention of one object. The first row is the mean over rows, the first column is over all levels.

    Brightness is relative to the largest weight of a row over all levels, and in the first column to its own maximum.

    Args:
        image: (H, W, 3) uint8 RGB.
        attention: attention of this object, with K = 1.
        box: its box, XYXY in pixels of ``image``.

    Returns:
        (H', W', 3) uint8 RGB.
    """
    scale = TILE / max(image.shape[:2])
    size = tuple(max(1, round(side * scale)) for side in image.shape[:2])
    gray = np.asarray(Image.fromarray(image).convert("L").resize(size[::-1]))[..., None] * 0.5
    levels = [attention.upsample(level, size)[0] for level in attention.levels]
    shown = np.stack([attention.density(size)[0], *levels], axis=1)  # (R, 1 + levels, *size)
    shown = np.concatenate([shown.mean(0, keepdims=True), shown])
    # The maximum over all cells, including those that the small image skips.
    cells = np.stack([x[0].max((-1, -2)) for x in attention.levels.values()])
    mean = max(x[0].mean(0).max() for x in attention.levels.values())
    brightest = np.concatenate([[mean], cells.max(0)])
    rows = ["mean", *(f"head {r + 1}" for r in range(len(shown) - 1))]
    tiles = []
    for row, maps, most in zip(rows, shown, brightest):
        line = []
        for column, heat in zip(["all levels", *attention.levels], maps):
            most_here = heat.max() if column == "all levels" else most
            heat = (heat / max(most_here, 1e-12)).clip(0, 1)[..., None]
            tile = Image.fromarray((gray * (1 - heat) + HEAT * heat).round().astype(np.uint8))
            _annotate(tile, f"{row}, {column}", box * scale)
            line.append(np.asarray(tile))
        tiles.append(np.hstack(line))
    body = np.vstack(tiles)
    return np.vstack([title_strip(title, body.shape[1]), body])


def _annotate(tile: Image.Image, text: str, box: np.ndarray) -> None:
    draw = ImageDraw.Draw(tile)
    draw.rectangle([0, 0, tile.width - 1, tile.height - 1], outline=(0, 0, 0))
    draw.rectangle([float(x) for x in box], outline=(255, 255, 255))
    font = ImageFont.load_default(10)
    draw.rectangle(draw.textbbox((2, 1), text, font=font), fill=(0, 0, 0))
    draw.text((2, 1), text, fill=(255, 255, 255), font=font)


def draw_attention(
    folder: Path,
    dataset: str,
    loss: ICDLoss,
    teacher: Teacher,
    mapper: Callable[[dict], dict],
    number: int,
) -> AttentionPictures:
    """Draw the attention for evenly spaced images with objects, one picture per image and one panel per object.

    Args:
        folder: output folder.
        dataset: a registered data set.
        loss: the result of :func:`load_icd`.
        mapper: a dataset mapper for evaluation.
        number: number of images.

    Raises:
        InputError: if the data set is not registered or has no objects, an image cannot be read, or an object's
            class is not one of the student's.
    """
    check_dataset(dataset)
    metadata = MetadataCatalog.get(dataset)
    records = [
        record
        for record in DatasetCatalog.get(dataset)
        if any(not one.get("iscrowd", 0) for one in record.get("annotations", ()))
    ]
    if not records:
        raise InputError(dataset, "no annotated object", "images with objects")
    names, drawn, inside, by_chance = metadata.get("thing_classes"), {}, [], []
    for scene in scenes(sample_evenly(records, number), mapper):
        truth = scene.panels["ground truth"]
        attention = compute_attention(loss, teacher, scene.batch, truth)
        height, width = scene.image.shape[:2]
        panels = []
        for k, (box, label) in enumerate(zip(truth.gt_boxes.tensor.numpy(), truth.gt_classes)):
            own, relative = attention.object_attention(k), box / [width, height, width, height]
            inside.append(own.fraction_inside(relative).mean())
            by_chance.append((relative[2:] - relative[:2]).prod())
            shares = ", ".join(
                f"{level} {share:.0%}" for level, share in own.level_fractions(0).items()
            )
            title = f"{k + 1} {names[label]}: {shares}; in the box {inside[-1]:.0%}"
            panels.append(attention_panel(scene.image, own, box, title))
        drawn[scene.name] = _grid(panels)
    files = save_pictures(folder, drawn)
    return AttentionPictures(files, float(np.mean(inside)), float(np.mean(by_chance)))


def _grid(panels: list[np.ndarray]) -> np.ndarray:
    """Arrange panels of equal size in a grid that is about square."""
    height, width = (side + GAP for side in panels[0].shape[:2])
    columns = min(len(panels), max(1, math.ceil(math.sqrt(len(panels) * height / width))))
    rows = math.ceil(len(panels) / columns)
    grid = np.full((rows * height - GAP, columns * width - GAP, 3), 255, np.uint8)
    for k, panel in enumerate(panels):
        y, x = k // columns * height, k % columns * width
        grid[y : y + height - GAP, x : x + width - GAP] = panel
    return grid
