"""Masks on a level's grid: where on a feature map an object lies, and where the image itself.

A cell (i, j) of a level with stride s stands for the image point ``((j + 0.5) s, (i + 0.5) s)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

KINDS = ("gaussian", "box")

AT_ONCE = 2**24
"""Cells of as many objects as are painted at once, 64 MiB; one object of each image is always taken."""


def pad_boxes(boxes: Sequence[Tensor]) -> Tensor:
    """Each image's boxes ``(G, 4)`` in one tensor ``(N, G, 4)``, the largest G; the slots left over cover no cell."""
    # No cell lies at a negative coordinate.
    return pad_sequence(list(boxes), batch_first=True, padding_value=-1.0)


@torch.no_grad()
def paint(boxes: Tensor, size: tuple[int, int], stride: int, kind: str = "gaussian") -> Tensor:
    """Paint each image's boxes on one level; where boxes overlap the largest value stands.

    * ``"gaussian"``: inside a box ``exp(-dx^2 / 2 - dy^2 / 2)``, dx and dy the distances to its centre in
      units of half its width and height: 1 in the centre, exp(-1/2) in the middle of an edge, exp(-1) in
      a corner; 0 outside.
    * ``"box"``: 1 inside a box, 0 outside.

    Args:
        boxes: ``(N, G, 4)``, XYXY in absolute pixels, see :func:`pad_boxes`; G may be 0.
        size: ``(H, W)`` of the level.
        stride: pixels from cell to cell.
        kind: which of these.

    Returns:
        ``(N, H, W)`` float32.
    """
    assert kind in KINDS, kind
    y, x = ((torch.arange(n, device=boxes.device) + 0.5) * stride for n in size)
    x0, y0, x1, y1 = boxes.float()[..., None].unbind(dim=2)
    # Both factors are (N, G, cells): a Gaussian of two axes is the product of two of one.
    rows, columns = _along(y, y0, y1, kind)[..., None], _along(x, x0, x1, kind)[:, :, None]
    mask = torch.zeros(len(boxes), *size, device=boxes.device)
    step = max(1, AT_ONCE // max(1, mask.numel()))
    for first in range(0, boxes.shape[1], step):
        some = slice(first, first + step)
        mask = torch.maximum(mask, (rows[:, some] * columns[:, some]).amax(dim=1))
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
    """Which cells of each level the images of a padded batch cover, in part at least.

    Args:
        image_sizes: (height, width) of each image without its padding, as in ``ImageList.image_sizes``.
        padded: (height, width) of the batch.
        sizes: ``(H, W)`` of each level; a cell is as wide as the mean of padded height / H and width / W.

    Returns:
        ``(N, H, W)`` bool for each level.
    """
    strides = [(padded[0] / h + padded[1] / w) / 2 for h, w in sizes]
    # In Python's own precision: an end that is a whole number must not be rounded up to the next.
    ends = [[[math.ceil(x / stride) for x in size] for size in image_sizes] for stride in strides]
    # (levels, 2, N, 1), which go to the device together.
    ends = torch.tensor(ends, device=device).reshape(len(sizes), -1, 2).transpose(1, 2)[..., None]
    valid = []
    for size, of_level in zip(sizes, ends):
        rows, columns = (torch.arange(n, device=device) < end for n, end in zip(size, of_level))
        valid.append(rows[:, :, None] & columns[:, None, :])
    return valid
