"""Shapes: a small generated detection data set on which larger models are clearly better.

Eight classes, four outlines times solid or striped, in textured images of 160 x 160 pixels. Objects
are 8 to 100 pixels long, rotated, squeezed, truncated by the border and occluded by each other;
there are unlabelled figures of other outlines and stripes in the background, and about one image in
twenty has no object.

Annotations:

* ``bbox`` is the extent of the whole figure, occluded parts included, clipped to the image, exact
  to 1/64 pixel;
* ``segmentation`` is the outline of the whole figure, exact to 1/64 pixel, also where it is occluded or
  outside the image;
* ``area`` counts the figure's pixels inside the image, occluded ones included;
* at least half of the pixels of an object are visible: a figure that would violate this is moved,
  so no figure with the outline of a class is unlabelled.

The same seed gives the same JSON and the same decoded pixels on every machine. Therefore all
arithmetic is on integers and on the raw bits of PCG64, a stream that NumPy guarantees, unlike the
methods of ``Generator``. An image depends on (seed, split, index) only, not on the counts.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..utils.errors import InputError

VERSION = 3  # incremented whenever a pixel or an annotation changes; 3 has outlines
_STREAM = 2  # incremented whenever a pixel or a box changes
SIZE = 160  # pixels, both sides
SPLITS = ("train", "val", "test")

OUTLINES = {
    "triangle": [(0, -1000), (866, 500), (-866, 500)],
    "square": [(-707, -707), (707, -707), (707, 707), (-707, 707)],
    "pentagon": [(0, -1000), (951, -309), (588, 809), (-588, 809), (-951, -309)],
    "circle": [(1000, 0), (966, 259), (866, 500), (707, 707), (500, 866), (259, 966)],
}
# A quarter of the circle's 24 corners is listed; a quarter turn is (x, y) -> (-y, x).
for _ in range(3):
    OUTLINES["circle"] += [(-y, x) for x, y in OUTLINES["circle"][-6:]]
DISTRACTORS = {
    "star": [(0, -1000), (265, -364), (951, -309), (428, 139), (588, 809)]
    + [(0, 450), (-588, 809), (-428, 139), (-951, -309), (-265, -364)],
    "plus": [(-300, -954), (300, -954), (300, -300), (954, -300), (954, 300), (300, 300)]
    + [(300, 954), (-300, 954), (-300, 300), (-954, 300), (-954, -300), (-300, -300)],
    "chevron": [(-700, -700), (300, -700), (1000, 0), (300, 700), (-700, 700), (0, 0)],
    "hourglass": [(-700, -900), (700, -900), (-700, 900), (700, 900)],
}
CLASSES = tuple(f"{fill}_{outline}" for outline in OUTLINES for fill in ("solid", "striped"))

_UNIT = 64  # polygon coordinates are in 1/64 pixel
_FINE = 4  # samples per pixel and axis: coverage is counted in sixteenths
_FULL = _FINE * _FINE
_TILT = 12  # figures are rotated by at most 21 degrees: half-angle tangent 12/64


class _Draw:
    """Uniform integers from the raw bits of PCG64, one stream per key."""

    def __init__(self, *key: int):
        self._bits = np.random.PCG64(np.random.SeedSequence(key))

    def __call__(self, low: int, high: int, shape: tuple[int, ...] | None = None):
        """Return an int, or an int32 array of ``shape``, in [low, high)."""
        if shape is None:
            return low + ((int(self._bits.random_raw()) >> 32) * (high - low) >> 32)
        raw = (self._bits.random_raw(math.prod(shape)) >> np.uint64(32)).astype(np.int64)
        return (low + (raw * (high - low) >> 32)).astype(np.int32).reshape(shape)

    def direction(self, most: int = 64) -> tuple[int, int]:
        """Return a random unit vector times 1024, from a rational half-angle tangent.

        The tangent is at most ``most`` / 64; with 64, all directions are possible.
        """
        k, sign = self(-most, most + 1), 1 if most < 64 else 2 * self(0, 2) - 1
        norm = 64 * 64 + k * k
        return sign * 1024 * (64 * 64 - k * k) // norm, sign * 1024 * 128 * k // norm


def _smooth_noise(draw: _Draw, cell: int, amplitude: int, channels: int) -> np.ndarray:
    """Interpolate random values ``cell`` pixels apart bilinearly to (SIZE, SIZE, channels)."""
    grid = draw(-amplitude, amplitude + 1, (SIZE // cell + 1, SIZE // cell + 1, channels))
    pixel = np.arange(SIZE, dtype=np.int32)
    at, t = pixel // cell, pixel % cell
    rows = grid[at] * (cell - t)[:, None, None] + grid[at + 1] * t[:, None, None]
    t = t[None, :, None]
    return (rows[:, at] * (cell - t) + rows[:, at + 1] * t) // (cell * cell)


def _background(draw: _Draw) -> np.ndarray:
    """Draw blotches of several sizes and patches of stripes; stripes alone thus indicate no object."""
    image = np.zeros((SIZE, SIZE, 3), np.int32) + draw(56, 200, (3,))
    for cell in (32, 16, 8):
        image += _smooth_noise(draw, cell, draw(4, 26), 3)
    y, x = np.indices((SIZE, SIZE), np.int32)
    for _ in range(draw(0, 3)):
        (c, s), width = draw.direction(), draw(2, 12)
        stripes = (x * c + y * s) // (1024 * width) & 1
        patches = _smooth_noise(draw, 32, 100, 1)[..., 0] > 10
        image += (stripes & patches)[..., None] * draw(-40, 41, (3,))
    return np.clip(image, 0, 255)


def _polygon(draw: _Draw, outline: list[tuple[int, int]], size: int) -> np.ndarray:
    """Squeeze, rotate and scale an outline to a longer side of ``size`` pixels, near (0, 0); (V, 2)."""
    points = np.array(outline, np.int64)
    points[:, 0] = points[:, 0] * draw(10, 17) // 16
    c, s = draw.direction(_TILT)
    points = points @ np.array([[c, s], [-s, c]], np.int64)
    points -= points.min(axis=0)
    points = points * (size * _UNIT) // points.max()
    return points + draw(0, _UNIT, (2,))


def _fill(points: np.ndarray) -> np.ndarray:
    """Return which samples are inside a polygon (even-odd rule); (4 * height, 4 * width) bool.

    In every row that it crosses, an edge flips all samples to its right.
    """
    spacing = _UNIT // _FINE
    width, height = (-(-points.max(axis=0) // _UNIT) * _FINE).tolist()
    (x1, y1), (x2, y2) = points.T[..., None], np.roll(points, -1, axis=0).T[..., None]
    y = np.arange(height) * spacing + spacing // 2
    crosses = (y1 > y) != (y2 > y)
    x = x1 + (y - y1) * (x2 - x1) // np.where(y1 == y2, 1, y2 - y1)
    column = np.clip((x - spacing // 2) // spacing + 1, 0, width)
    flips = (np.arange(height) * (width + 1) + column)[crosses]
    parity = np.bincount(flips, minlength=height * (width + 1)).reshape(height, width + 1)
    return (np.cumsum(parity, axis=1) & 1).astype(bool)[:, :width]


def _per_pixel(samples: np.ndarray) -> np.ndarray:
    """Count the samples of each pixel, 0 to 16; (height, width)."""
    h, w = samples.shape
    rows = samples.reshape(h // _FINE, _FINE, w).sum(axis=1, dtype=np.int32)
    return rows.reshape(h // _FINE, w // _FINE, _FINE).sum(axis=2, dtype=np.int32)


class _Scene:
    """An image in progress, and the visible pixels of each object in it."""

    def __init__(self, draw: _Draw):
        self.draw = draw
        self.image = _background(draw)
        self.owner = np.full((SIZE, SIZE), -1, np.int32)  # index of the visible object, or -1
        self.visible: list[int] = []  # of each object, the number of visible pixels
        self.whole: list[int] = []  # of each object, the number of all pixels
        self.objects: list[dict] = []

    def add(self, outline: list[tuple[int, int]], striped: int, size: int, category: int | None):
        """Draw a figure on top, if there is a place for it; with category None, as a distractor."""
        points = _polygon(self.draw, outline, size)
        inside = _fill(points)
        cover = _per_pixel(inside)
        core = 2 * cover >= _FULL
        height, width = core.shape
        for _ in range(8):  # places to try before the figure is dropped
            left = self.draw(-width // 2, SIZE - width // 2)
            top = self.draw(-height // 2, SIZE - height // 2)
            y0, y1 = max(top, 0), min(top + height, SIZE)
            x0, x1 = max(left, 0), min(left + width, SIZE)
            here, own = np.s_[y0:y1, x0:x1], np.s_[y0 - top : y1 - top, x0 - left : x1 - left]
            seen = core[own]
            shown = int(seen.sum())
            hides = np.bincount(self.owner[here][seen] + 1, minlength=len(self.objects) + 1)[1:]
            visible = [v - h for v, h in zip(self.visible, hides.tolist())]
            others_show = all(2 * v >= w for v, w in zip(visible, self.whole))
            if others_show and 2 * shown >= core.sum() > 0:
                break
        else:
            return

        stripes = self._stripes(inside) if striped else np.zeros_like(inside)
        self._paint(here, seen, cover[own], _per_pixel(stripes)[own])
        self.visible = visible
        self.owner[here][seen] = -1 if category is None else len(self.objects)
        if category is not None:
            self.visible.append(shown)
            self.whole.append(int(core.sum()))
            points = points + np.array([left, top]) * _UNIT
            polygon = (points / _UNIT).flatten().tolist()  # exact
            points = np.clip(points, 0, SIZE * _UNIT)
            low, high = points.min(axis=0), points.max(axis=0)
            box = [value / _UNIT for value in (*low.tolist(), *(high - low).tolist())]  # exact
            self.objects.append(
                {"category_id": category, "bbox": box, "area": shown, "segmentation": [polygon]}
            )

    def _stripes(self, inside: np.ndarray) -> np.ndarray:
        (c, s), size = self.draw.direction(), max(inside.shape)
        band = max(self.draw(size // 8, size // 5 + 1), 2 * _FINE)
        row, column = np.indices(inside.shape, np.int32)
        return inside & ((column * c + row * s) // (1024 * band) % 2 == 1)

    def _paint(self, here, seen: np.ndarray, cover: np.ndarray, second: np.ndarray) -> None:
        """Use two colours that differ by at least 32 in every channel from below and from each other.

        Modulo 256 keeps them in range, with every value possible.
        """
        ground = self.image[here]
        colour = (ground[seen].sum(axis=0) // seen.sum() + self.draw(32, 225, (3,))) % 256
        other = (colour + self.draw(32, 225, (3,))) % 256
        cover, second = cover[..., None], second[..., None]
        mixed = ground * (_FULL - cover) + colour * (cover - second) + other * second
        self.image[here] = mixed // _FULL


def draw_image(seed: int, split: str, index: int) -> tuple[np.ndarray, list[dict]]:
    """Draw one image.

    Returns:
        image: (160, 160, 3) uint8, RGB.
        objects: dicts with ``category_id`` (from 1), ``bbox`` (XYWH, absolute pixels), ``area`` and ``segmentation``
            (one polygon).
    """
    draw = _Draw(_STREAM, seed, SPLITS.index(split), index)
    scene = _Scene(draw)
    without_objects = draw(0, 20) == 0
    for _ in range(draw(3, 12)):
        labelled = draw(0, 4) > 0 and not without_objects
        outlines = list((OUTLINES if labelled else DISTRACTORS).values())
        kind, striped = draw(0, len(outlines)), draw(0, 2)
        shortest = (8, 16, 16, 32, 32, 64)[draw(0, 6)]
        size = draw(shortest, min(2 * shortest, 101))
        scene.add(outlines[kind], striped, size, 1 + 2 * kind + striped if labelled else None)
    grain = draw(2, 10)
    image = scene.image + draw(-grain, grain + 1, (SIZE, SIZE, 1))
    return np.clip(image, 0, 255).astype(np.uint8), scene.objects


def _draw_set(folder: Path, settings: dict, bar: tqdm) -> None:
    for split in SPLITS:
        (folder / split).mkdir(parents=True)
        images, annotations = [], []
        for index in range(settings[split]):
            pixels, objects = draw_image(settings["seed"], split, index)
            name = f"{index + 1:06d}.png"
            Image.fromarray(pixels).save(folder / split / name, compress_level=1)
            images.append({"id": index + 1, "file_name": name, "width": SIZE, "height": SIZE})
            for one in objects:
                ids = {"id": len(annotations) + 1, "image_id": index + 1}
                annotations.append({**ids, **one, "iscrowd": 0})
            bar.update()
        content = {
            "info": {"description": "d2kd shapes", "split": split, **settings},
            "licenses": [],
            "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)],
            "images": images,
            "annotations": annotations,
        }
        (folder / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")


def _present(root: Path, settings: dict) -> bool:
    """Return whether ``root`` contains exactly this set; raise InputError if it contains anything else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    expected = f"shapes of {settings}, or a folder that does not exist yet"
    for split in SPLITS:
        try:
            info = json.loads((root / f"{split}.json").read_text(encoding="utf-8"))["info"]
            found = {key: info.get(key) for key in settings}
            count = sum(name.endswith(".png") for name in os.listdir(root / split))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise InputError(
                root, f"no readable {split}.json and {split}/ of shapes", expected
            ) from None
        if found != settings:
            raise InputError(root, f"shapes of {found}", expected)
        if count != settings[split]:
            raise InputError(
                root / split, f"{count} images", f"{settings[split]}; delete {root} to draw anew"
            )
    return True


def write_shapes(
    root: str | Path, *, seed: int = 0, train: int = 800, val: int = 200, test: int = 200
) -> Path:
    """Write ``root/{train,val,test}.json`` and ``root/{train,val,test}/*.png``, unless they exist.

    Writing is atomic: the set is drawn in a temporary folder beside ``root``, which is then renamed.
    Several processes may do this at the same time. An image takes about 15 ms.

    Raises:
        InputError: if ``root`` contains something else, or an incomplete set.
    """
    root = Path(root)
    settings = {"version": VERSION, "seed": seed, "train": train, "val": val, "test": test}
    for key, value in settings.items():
        least = 0 if key == "seed" else 1
        if not isinstance(value, int) or value < least:
            raise InputError(f"{key} of shapes", repr(value), f"a whole number from {least}")
    if _present(root, settings):
        return root
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{root.name}.", dir=root.parent) as beside:
            # In a subfolder, because other users cannot read a TemporaryDirectory itself.
            drawn = Path(beside) / root.name
            total = train + val + test
            with tqdm(total=total, desc=f"drawing {root}", unit="image", mininterval=1) as bar:
                _draw_set(drawn, settings, bar)
            try:
                drawn.rename(root)
            except OSError:
                if not _present(root, settings):  # otherwise another process was faster
                    raise
    except OSError as error:
        raise InputError(root, error.strerror or error, "a folder that can be written") from error
    return root


def default_root(*, seed: int = 0, train: int = 800, val: int = 200, test: int = 200) -> Path:
    """Return the set's folder in ``$D2KD_DATASETS``, by default ``datasets`` of the working folder."""
    name = f"shapes_v{VERSION}_seed{seed}_{train}_{val}_{test}"
    return Path(os.environ.get("D2KD_DATASETS") or "datasets") / name


def register_shapes(
    root: str | Path | None = None,
    *,
    seed: int = 0,
    train: int = 800,
    val: int = 200,
    test: int = 200,
) -> None:
    """Register ``shapes_train``, ``shapes_val`` and ``shapes_test`` with Detectron2.

    Nothing is drawn before a set is loaded or checked by ``check_dataset``. Importing ``d2kd.data``
    registers the default set; a later call replaces it.
    """
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import load_coco_json

    counts = {"seed": seed, "train": train, "val": val, "test": test}
    root = Path(root) if root is not None else default_root(**counts)
    prepare = partial(write_shapes, root, **counts)
    for split in SPLITS:
        name, files = f"shapes_{split}", (str(root / f"{split}.json"), str(root / split))
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
        if name in MetadataCatalog.list():
            MetadataCatalog.remove(name)

        def load(name=name, files=files):
            prepare()
            return load_coco_json(*files, name)

        DatasetCatalog.register(name, load)
        MetadataCatalog.get(name).set(
            json_file=files[0],
            image_root=files[1],
            evaluator_type="coco",
            thing_classes=list(CLASSES),
            prepare=prepare,
        )
