"""Masks on a level's grid: where on a feature map an object lies, and where the image itself.

A cell (i, j) of a level with stride s stands for the image point ``((j + 0.5) s, (i + 0.5) s)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError

KINDS = ("gaussian", "box", "none")


def check_kind(kind: str) -> str:
    """The kind itself.

    Raises:
        InputError: there is no such mask.
    """
    if kind not in KINDS:
        raise InputError("mask", kind, " or ".join(KINDS))
    return kind


@torch.no_grad()
def paint(
    boxes: list[Tensor], size: tuple[int, int], stride: int, kind: str = "gaussian"
) -> Tensor:
    """Paint each image's boxes on one level; where boxes overlap the largest value stands.

    * ``"gaussian"``: inside a box ``exp(-dx^2 / 2 - dy^2 / 2)``, dx and dy the distances to its centre in
      units of half its width and height: 1 in the centre, exp(-1/2) in the middle of an edge, exp(-1) in
      a corner; 0 outside.
    * ``"box"``: 1 inside a box, 0 outside.
    * ``"none"``: 1 everywhere.

    Args:
        boxes: for each image ``(G, 4)``, XYXY in absolute pixels; G may be 0.
        size: ``(H, W)`` of the level.
        stride: pixels from cell to cell.
        kind: which of these.

    Returns:
        ``(N, H, W)`` float32.
    """
    device = boxes[0].device if boxes else None
    if check_kind(kind) == "none":
        return torch.ones(len(boxes), *size, device=device)
    y, x = ((torch.arange(n, device=device) + 0.5) * stride for n in size)
    masks = []
    for image_boxes in boxes:
        if len(image_boxes) == 0:
            masks.append(torch.zeros(size, device=device))
            continue
        x0, y0, x1, y1 = image_boxes.float()[:, :, None].unbind(dim=1)
        # Both factors are (G, cells): a Gaussian of two axes is the product of two of one.
        masks.append(
            (_along(y, y0, y1, kind)[:, :, None] * _along(x, x0, x1, kind)[:, None, :]).amax(dim=0)
        )
    return torch.stack(masks) if masks else torch.zeros(0, *size)


def _along(points: Tensor, low: Tensor, high: Tensor, kind: str) -> Tensor:
    inside = ((points >= low) & (points <= high)).float()
    if kind == "box":
        return inside
    half = ((high - low) / 2).clamp(min=1e-6)
    return inside * torch.exp(-(((points - (low + high) / 2) / half) ** 2) / 2)


def valid_cells(
    image_sizes: Sequence[tuple[int, int]],
    padded: tuple[int, int],
    size: tuple[int, int],
    device: torch.device | str | None = None,
) -> Tensor:
    """Which cells of a level the images of a padded batch cover, in part at least.

    Args:
        image_sizes: (height, width) of each image without its padding, as in ``ImageList.image_sizes``.
        padded: (height, width) of the batch.
        size: ``(H, W)`` of the level; a cell is as wide as the mean of padded height / H and width / W.

    Returns:
        ``(N, H, W)`` bool.
    """
    stride = (padded[0] / size[0] + padded[1] / size[1]) / 2
    # In Python's own precision: an end that is a whole number must not be rounded up to the next.
    ends = [[math.ceil(side / stride) for side in image_size] for image_size in image_sizes]
    ends = torch.tensor(ends, device=device).reshape(-1, 2)
    rows, columns = (torch.arange(n, device=device) < end[:, None] for n, end in zip(size, ends.T))
    return rows[:, :, None] & columns[:, None, :]
