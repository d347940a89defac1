"""The pictures of a report: images with detections, drawn by Detectron2's Visualizer, as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..comparison.comparison import Comparison
from ..comparison.objects import ChangedObject, Picture
from ..data.images import read_image
from ..visualization.panels import mask_outlines
from ..visualization.text import literal_text, one_line

WON, LOST = "#12915f", "#d1433f"
RIGHT, WRONG, TRUTH = "#ffffff", "#10151c", "#ffffff"
LIGHT = {WON: "#6be3b3", LOST: "#ff9d99"}
"""Colors of text on black."""
PANEL, TILE = 560, 220
"""Longer side of a gallery panel and of a tile in pixels."""
QUALITY = 82


class Pictures:
    """Draws the pictures of a comparison.

    Args:
        comparison: the comparison.
        color: detector -> color.
    """

    def __init__(self, comparison: Comparison, color: dict[str, str]):
        self.c, self.color = comparison, color
        self.classes = comparison.dataset["classes"]
        self.read = lru_cache(maxsize=4)(_read)

    def tiles(self, changes: Sequence[ChangedObject]) -> list[dict[str, Any]]:
        """Draw each object with the detections of the baseline and of the featured detector that find it."""
        tiles = []
        for change in changes:
            picture = self.c.objects.pictures[change.picture]
            target = picture.truth[change.object]
            image = self.read(picture.file_name)
            tile = {"name": self.classes[target["label"]], "score": change.score}
            for side, name in (("baseline", self.c.baseline), ("featured", self.c.featured)):
                tile[side] = None if image is None else self._tile(image, picture, name, change)
            tiles.append(tile)
        return tiles

    def _tile(self, image: np.ndarray, picture: Picture, name: str, change: ChangedObject) -> str:
        target = picture.truth[change.object]
        window = _around(target["box"], image.shape[1], image.shape[0])
        crop = image[window[1] : window[3], window[0] : window[2]]
        color = WON if change.object in picture.won else LOST
        found = [s for s in picture.detections[name] if s["object"] == change.object]
        scale = TILE / max(crop.shape[:2])
        size = [max(1, round(side * scale)) for side in crop.shape[1::-1]]
        drawn = Image.fromarray(crop).resize(size, _resampling(scale))
        draw = ImageDraw.Draw(drawn)
        # A tile shows two objects at most; Visualizer is not needed.
        for one, ink, width in [(target, TRUTH, 2), *((one, color, 6) for one in found)]:
            x0, y0, x1, y1 = ((np.asarray(one["box"]) - np.tile(window[:2], 2)) * scale).tolist()
            if ink == TRUTH and found:
                continue  # the detection is drawn instead
            outlines = _outlines(one.get("mask"))
            for points in outlines:
                points = (points - window[:2]) * scale
                draw.line([*map(tuple, points), tuple(points[0])], fill=ink, width=width // 2)
            if not outlines:
                draw.rectangle([x0, y0, max(x0, x1), max(y0, y1)], outline=ink, width=width)
        return _data_uri(drawn)

    def gallery(self, numbers: Sequence[int]) -> list[list[dict[str, Any]]]:
        """Draw each image with the ground truth, and with the detections of each detector, side by side."""
        rows = []
        for number in numbers:
            picture = self.c.objects.pictures[number]
            image = self.read(picture.file_name)
            truth = [
                _Mark(t, TRUTH, style=":" if t["crowd"] else "-", text=self.classes[t["label"]])
                for t in picture.truth
            ]
            count = sum(not t["crowd"] for t in picture.truth)
            row = [("ground truth: " + _plural(count, "object"), truth)]
            for d in self.c.detectors:
                found = len({s["object"] for s in picture.detections[d.name]} - {None})
                row.append((f"{d.name}: finds {found}", self._marks(picture, d.name)))
            rows.append(
                [
                    {"title": t, "image": None if image is None else _draw(image, marks, PANEL)}
                    for t, marks in row
                ]
            )
        return rows

    def _marks(self, picture: Picture, name: str) -> list[_Mark]:
        """Return the boxes to draw: false positives first, then true positives, then lost objects on top."""
        marks = []
        for seen in sorted(picture.detections[name], key=lambda s: s["object"] is not None):
            text = f"{self.classes[seen['label']]} {seen['score']:.0%}"
            if seen["object"] is None:
                marks.append(_Mark(seen, WRONG, width=1))
            elif name == self.c.featured and seen["object"] in picture.won:
                marks.append(_Mark(seen, WON, width=4, text=f"won: {text}"))
            elif name == self.c.baseline and seen["object"] in picture.lost:
                marks.append(_Mark(seen, LOST, width=4, text=text))
            else:
                marks.append(_Mark(seen, RIGHT, width=2, text=text))
        if name == self.c.featured:
            for place in picture.lost:
                label = f"lost: {self.classes[picture.truth[place]['label']]}"
                marks.append(_Mark(picture.truth[place], LOST, width=3, style="--", text=label))
        return marks


class _Mark:
    """An object or a detection to draw, a dict with its ``box`` and, with masks, its ``mask``."""

    def __init__(self, of: dict, color: str, width: float = 1.5, style: str = "-", text: str = ""):
        self.box, self.mask = of["box"], of.get("mask")
        self.color, self.width, self.style, self.text = color, width, style, text


def _outlines(rle: dict | None) -> list[np.ndarray]:
    """Return the outlines (P, 2) of a mask, in pixels; none without a mask, or if it is empty."""
    return [] if rle is None else mask_outlines(rle, *rle["size"])


def _draw(image: np.ndarray, marks: Sequence[_Mark], side: int) -> str:
    """Resize an image to a longer side of ``side`` pixels, draw the marks, and return a data URI."""
    # Imported here, since importing matplotlib takes a second.
    from detectron2.utils.visualizer import Visualizer

    height, width = image.shape[:2]
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    visualizer = Visualizer(np.asarray(Image.fromarray(image).resize(size, _resampling(scale))))
    with literal_text():
        for mark in marks:
            box = np.asarray(mark.box) * scale
            visualizer.draw_box(box, alpha=1, edge_color=mark.color, line_style=mark.style)
            visualizer.output.ax.patches[-1].set_linewidth(mark.width)
            for points in _outlines(mark.mask):
                visualizer.draw_polygon(points * scale, mark.color, alpha=0.35)
            if mark.text:
                corner = (max(box[0], 0), max(box[1], 0))
                visualizer.draw_text(
                    one_line(mark.text),
                    corner,
                    font_size=9,
                    color=LIGHT.get(mark.color, "#ffffff"),
                    horizontal_alignment="left",
                )
        drawn = visualizer.get_output().get_image()
    return _data_uri(Image.fromarray(drawn))


def _resampling(scale: float) -> Image.Resampling:
    """Return the resampling filter: nearest for large scales, to show the pixels of the detector's input."""
    return Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS


def _data_uri(picture: Image.Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def _around(box: Sequence[float], width: int, height: int) -> tuple[int, int, int, int]:
    """Return a square window (XYXY) in the image around an object: 2.4 times its size, at least 1/8 of the image's."""
    side = max(2.4 * max(box[2] - box[0], box[3] - box[1]), max(width, height) / 8)
    side = int(min(side, width, height))
    x = int(np.clip((box[0] + box[2] - side) / 2, 0, width - side))
    y = int(np.clip((box[1] + box[3] - side) / 2, 0, height - side))
    return x, y, x + max(side, 1), y + max(side, 1)


def _read(file_name: str) -> np.ndarray | None:
    try:
        return read_image(file_name, "RGB")
    except Exception:  # missing or broken; the report is written without it
        return None


def _plural(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")
