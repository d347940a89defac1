"""Similarity of the feature maps of detectors: cosine similarity of the channel vectors at each cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers.masks import valid_cells


class FeatureSimilarity:
    """Mean cosine similarity between the first detector and each other one, accumulated image by image.

    Args:
        names: names of the detectors.
        channels: for each detector, level -> number of channels.

    Attributes:
        levels: levels that all detectors have.
        left_out: detector -> reason why its feature maps cannot be compared with those of the first.
    """

    def __init__(self, names: Sequence[str], channels: Sequence[Mapping[str, int]]):
        self.names = list(names)
        self.levels = [p for p in channels[0] if all(p in others for others in channels)]
        self.left_out: dict[str, str] = {}
        self.compared: list[int] = []
        for e in range(1, len(names)):
            pairs = [(channels[0][p], channels[e][p]) for p in self.levels]
            if not pairs:
                self.left_out[names[e]] = "no level in common"
            elif different := [(a, b) for a, b in pairs if a != b]:
                self.left_out[names[e]] = "{} channels beside {}".format(*different[0][::-1])
            else:
                self.compared.append(e)
        # (detector, level, everywhere / in objects, sum / number of cells)
        self.counts: dict[str, np.ndarray] = {
            "cosine": np.zeros((len(names), len(self.levels), 2, 2))
        }

    def update(
        self,
        features: Sequence[Mapping[str, Tensor]],
        image_size: tuple[int, int],
        padded: tuple[int, int],
        boxes: Tensor,
    ) -> None:
        """Add an image.

        Args:
            features: for each detector, level -> (1, C, H, W).
            image_size, padded: size of the first detector's input without and with padding, (height, width).
            boxes: (G, 4) ground-truth boxes, XYXY in pixels of the first detector's input.
        """
        for level, name in enumerate(self.levels):
            reference = features[0][name]
            size = tuple(reference.shape[-2:])
            [[counted]] = valid_cells([image_size], padded, [size])
            inside = counted & _in_boxes(boxes, padded, size)
            for e in self.compared:
                other = features[e][name]
                if other.shape[-2:] != reference.shape[-2:]:
                    other = F.interpolate(other, size, mode="bilinear", align_corners=False)
                cosine = F.cosine_similarity(reference.float(), other.float(), dim=1)[0].cpu()
                for where, cells in enumerate((counted, inside)):
                    self.counts["cosine"][e, level, where] += (
                        float(cosine[cells].sum()),
                        int(cells.sum()),
                    )

    def summarize(self) -> dict[str, Any]:
        """Return the means as plain Python data."""
        rows = []
        for e in self.compared:
            for level, name in enumerate(self.levels):
                everywhere, inside = (
                    float(total / count) if count else None
                    for total, count in self.counts["cosine"][e, level]
                )
                rows.append(
                    {
                        "first": self.names[0],
                        "second": self.names[e],
                        "level": name,
                        "everywhere": everywhere,
                        "in_objects": inside,
                    }
                )
        return {"rows": rows, "left_out": self.left_out}


def _in_boxes(boxes: Tensor, padded: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Return (H, W), whether the centre of a cell lies in a box."""
    rows, columns = (
        (torch.arange(cells) + 0.5) * (side / cells) for cells, side in zip(size, padded)
    )
    in_row = (boxes[:, 1, None] <= rows) & (rows < boxes[:, 3, None])
    in_column = (boxes[:, 0, None] <= columns) & (columns < boxes[:, 2, None])
    return (in_row[:, :, None] & in_column[:, None, :]).any(dim=0)
