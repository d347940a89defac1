"""The sizes of a data set's images and objects, from which image size and anchors are chosen and checked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from detectron2.structures import BoxMode


@dataclass(frozen=True)
class DataSizes:
    """Sizes in pixels of the files.

    Attributes:
        images: (N, 2), width and height of each image.
        boxes: (M, 2), width and height of each object; crowds and boxes without area are left out.
        image_of: (M,), row of each object's image in ``images``.
    """

    images: np.ndarray
    boxes: np.ndarray
    image_of: np.ndarray

    @classmethod
    def of(cls, records: Iterable[dict]) -> DataSizes:
        """Measure Detectron2's dataset dicts; those without a width and a height are left out."""
        images, rows = [], []
        for record in records:
            if "width" not in record or "height" not in record:
                continue
            for one in record.get("annotations", ()):
                x0, y0, x1, y1 = BoxMode.convert(one["bbox"], one["bbox_mode"], BoxMode.XYXY_ABS)
                if x1 > x0 and y1 > y0 and not one.get("iscrowd", 0):
                    rows.append((x1 - x0, y1 - y0, len(images)))
            images.append((record["width"], record["height"]))
        table = np.array(rows, dtype=float).reshape(-1, 3)
        return cls(
            np.array(images, dtype=float).reshape(-1, 2), table[:, :2], table[:, 2].astype(int)
        )

    def resized(self, short_edge: float, max_size: float) -> np.ndarray:
        """Return ``boxes`` in pixels after Detectron2's ``ResizeShortestEdge``."""
        short, long = self.images.min(axis=1), self.images.max(axis=1)
        scale = np.minimum(short_edge / short, max_size / long)
        return self.boxes * scale[self.image_of, None]
