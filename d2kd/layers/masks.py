"""Masks on the grid of a feature level: the cells of objects, and the cells of the image without padding.

The centre of cell (i, j) of a level with stride s is the image point ``((j + 0.5) s, (i + 0.5) s)``.

Notation: N images, G boxes per image, H and W of a level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from detectron2.structures import ImageList
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

MASK_KINDS = ("gaussian", "box")

MAX_CELLS_PER_CHUNK = 2**24
"""Maximum number of cells, over objects, per chunk (64 MiB); a chunk has at least one object of each image."""


def pad_boxes(boxes: Sequence[Tensor]) -> Tensor:
    """Stack each image's boxes in one tensor ``(N, G, 4)``, padded to the largest G with boxes that cover no cell."""
    # No cell centre has a negative coordinate.
    return pad_sequence(list(boxes), batch_first=True, padding_value=-1.0)


@torch.no_grad()
def boxes_to_mask(
    boxes: Tensor, size: tuple[int, int], stride: int, kind: str = "gaussian"
) -> Tensor:
    """Draw each image's boxes on the grid of a level. Where boxes overlap, the larger value is used.

    * ``"gaussian"``: ``exp(-dx^2 / 2 - dy^2 / 2)`` inside a box, 0 outside. dx and dy are distances to its centre in
      units of half its width and height, so values are 1 at the centre and exp(-1) at a corner.
    * ``"box"``: 1 inside a box, 0 outside.

    Args:
        boxes: ``(N, G, 4)``, XYXY in absolute pixels, see :func:`pad_boxes`; G may be 0.
        size: ``(H, W)`` of the level.
        stride: stride of the level in pixels.
        kind: "gaussian" or "box".

    Returns:
        ``(N, H, W)`` float32.
    """
    assert kind in MASK_KINDS, kind
    y, x = ((torch.arange(n, device=boxes.device) + 0.5) * stride for n in size)
    x0, y0, x1, y1 = boxes.float()[..., None].unbind(dim=2)
    # A two-dimensional Gaussian is the product of two one-dimensional ones, each (N, G, cells).
    rows, columns = _along(y, y0, y1, kind)[..., None], _along(x, x0, x1, kind)[:, :, None]
    mask = torch.zeros(len(boxes), *size, device=boxes.device)
    chunk = max(1, MAX_CELLS_PER_CHUNK // max(1, mask.numel()))
    for start in range(0, boxes.shape[1], chunk):
        part = slice(start, start + chunk)
        mask = torch.maximum(mask, (rows[:, part] * columns[:, part]).amax(dim=1))
    return mask


def _along(points: Tensor, low: Tensor, high: Tensor, kind: str) -> Tensor:
    inside = ((points >= low) & (points <= high)).float()
    if kind == "box":
        return inside
    half = ((high - low) / 2).clamp(min=1e-6)
    return inside * torch.exp(-(((points - (low + high) / 2) / half) ** 2) / 2)


def valid_cells(
    image_sizes: Sequence[tuple[int, int]],
    padded: tuple[int, int],
    sizes: Sequence[tuple[int, int]],
    device: torch.device | str | None = None,
) -> list[Tensor]:
    """Return which cells of each level are covered, at least partly, by the images of a padded batch.

    Args:
        image_sizes: (height, width) of each image without padding, as in ``ImageList.image_sizes``.
        padded: (height, width) of the batch.
        sizes: ``(H, W)`` of each level. The stride is taken as the mean of padded height / H and padded width / W.

    Returns:
        list[Tensor]: ``(N, H, W)`` bool for each level.
    """
    strides = [(padded[0] / h + padded[1] / w) / 2 for h, w in sizes]
    # In double precision, so that ceil() of an integer is exact.
    ends = [[[math.ceil(x / stride) for x in size] for size in image_sizes] for stride in strides]
    # (levels, 2, N, 1), in one copy to the device, for which nothing waits.
    ends = (
        torch.tensor(ends)
        .to(device=device, non_blocking=True)
        .reshape(len(sizes), -1, 2)
        .transpose(1, 2)[..., None]
    )
    valid = []
    for size, level_ends in zip(sizes, ends):
        rows, columns = (torch.arange(n, device=device) < end for n, end in zip(size, level_ends))
        valid.append(rows[:, :, None] & columns[:, None, :])
    return valid


def cells_in_images(images: ImageList, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Return :func:`valid_cells` of levels of a padded batch, on its device."""
    padded = images.tensor.shape[-2:]
    return valid_cells(images.image_sizes, padded, sizes, images.tensor.device)
