"""Masks as COCO's run-length encoding (RLE)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from torch import Tensor


def to_rle(segmentation: Any, height: int, width: int) -> dict[str, Any] | None:
    """Return polygons or an RLE of a COCO file as a compressed RLE whose ``counts`` are text; None if there is no mask."""
    if isinstance(segmentation, list):
        polygons = [x for x in segmentation if len(x) >= 6]
        rle = mask_util.merge(mask_util.frPyObjects(polygons, height, width)) if polygons else None
    elif segmentation and isinstance(segmentation["counts"], list):
        rle = mask_util.frPyObjects(segmentation, height, width)
    else:
        rle = segmentation
    if not rle:
        return None
    counts = rle["counts"]
    return {
        "size": list(rle["size"]),
        "counts": counts.decode() if isinstance(counts, bytes) else counts,
    }


def encode_masks(masks: Tensor) -> list[dict[str, Any]]:
    """Return masks ``(D, H, W)``, bool on the CPU, as RLE of the form of :func:`to_rle`."""
    pixels = masks.numpy().astype(np.uint8)
    return [to_rle(mask_util.encode(np.asfortranarray(mask)), *mask.shape) for mask in pixels]


def object_array(values: Sequence[Any]) -> np.ndarray:
    """Return a one-dimensional array of any objects."""
    made = np.empty(len(values), dtype=object)
    made[:] = values
    return made
