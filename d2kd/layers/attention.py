"""Instances asked about an image: queries that attend to all cells of a feature pyramid.

Letters: N images, K queries of an image, S cells of all levels together, C channels, M heads of d = C / M
channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError


def sine_positions(valid: Tensor, channels: int) -> Tensor:
    """Where a cell lies in its image, in sines (DETR, arXiv 2005.12872).

    Coordinates count valid cells, and are scaled so that the last valid row and column have 2 pi.

    Args:
        valid: ``(N, H, W)`` bool, which cells of a level the image covers.
        channels: half of them, rounded down, tell the row, the others the column; sine and cosine by turns.

    Returns:
        ``(N, H, W, channels)`` float32.
    """
    halves = []
    for axis, width in ((1, channels // 2), (2, channels - channels // 2)):
        count = valid.cumsum(axis, dtype=torch.float32)
        last = count.narrow(axis, count.shape[axis] - 1, 1)
        index = torch.arange(width, device=valid.device)
        period = 10000 ** (2 * index.div(2, rounding_mode="floor") / width)
        angle = (count / (last + 1e-6) * 2 * math.pi)[..., None] / period
        halves.append(torch.where(index % 2 == 0, angle.sin(), angle.cos()))
    return torch.cat(halves, dim=-1)


@dataclass
class Decoded:
    """What a decoder layer found.

    Attributes:
        queries: ``(N, K, C)``.
        values: ``(N, M, S, d)``, what each head could have read in each cell.
        attention: ``(N, M, S)`` without gradient, how much the chosen queries of an image read there, summed
            over these; None where none were chosen.
        entropy: how scattered that is: each chosen query's entropy by that of even attention to all valid
            cells of its image, 1 or less, on average over heads and queries; NaN where there are no queries.
    """

    queries: Tensor
    values: Tensor
    attention: Tensor | None = None
    entropy: Tensor | None = None


class InstanceDecoderLayer(nn.Module):
    """Cross-attention and a two-layer perceptron, each added to its input and then normalised.

    Queries do not see each other. Positions are projected and added to the keys alone.

    Args:
        channels: C.
        heads: M.
        hidden: of the perceptron; None: 4 C.

    Raises:
        InputError: the heads do not divide the channels.
    """

    def __init__(self, channels: int, heads: int, hidden: int | None = None):
        super().__init__()
        if heads < 1 or channels % heads:
            raise InputError("heads", heads, f"a divisor of {channels} channels")
        self.heads = heads
        self.query, self.key = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.value, self.out = value_projection(channels, channels), nn.Linear(channels, channels)
        self.position = nn.Linear(channels, channels)
        hidden = 4 * channels if hidden is None else hidden
        self.perceptron = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels)
        )
        self.attention_norm = nn.LayerNorm(channels)
        self.perceptron_norm = nn.LayerNorm(channels)
        for projection in (self.query, self.key):
            _init_projection(projection)
        nn.init.zeros_(self.out.bias)

    def forward(
        self,
        queries: Tensor,
        tokens: Tensor,
        positions: Tensor,
        valid: Tensor,
        chosen: Tensor | None = None,
        mebibytes: float = 64,
    ) -> Decoded:
        """Ask a pyramid.

        No tensor of all queries and cells is formed where PyTorch has a fused attention for the device.

        Args:
            queries: ``(N, K, C)``.
            tokens: ``(N, S, C)``, cells of all levels.
            positions: ``(N, S, C)``.
            valid: ``(N, S)`` bool, which cells may be read; at least one of each image.
            chosen: ``(N, K)`` bool, queries whose attention is wanted.
            mebibytes: what that may hold at a time, see :func:`summed_attention`.
        """
        query, key, value = self._query(queries), self._key(tokens, positions), self._value(tokens)
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=valid[:, None, None])
        decoded = self.attention_norm(queries + self.out(read.transpose(1, 2).flatten(2)))
        decoded = Decoded(self.perceptron_norm(decoded + self.perceptron(decoded)), value)
        if chosen is not None:
            decoded.attention, decoded.entropy = summed_attention(
                query, key, valid, chosen, mebibytes
            )
        return decoded

    @torch.no_grad()
    def logits(self, queries: Tensor, tokens: Tensor, positions: Tensor, valid: Tensor) -> Tensor:
        """Attention before the softmax, of every query at once: ``(N, M, K, S)``, -inf in invalid cells."""
        query, key = self._query(queries), self._key(tokens, positions)
        return _logits(query, key, valid[:, None, None])

    def _query(self, queries: Tensor) -> Tensor:
        return by_head(self.query(queries), self.heads)

    def _key(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return by_head(self.key(tokens + self.position(positions)), self.heads)

    def _value(self, tokens: Tensor) -> Tensor:
        return by_head(self.value(tokens), self.heads)


def by_head(x: Tensor, heads: int) -> Tensor:
    """``(N, L, C)`` to ``(N, M, L, d)``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def value_projection(channels: int, out_channels: int) -> nn.Linear:
    """A linear map as the layer's own projections begin."""
    return _init_projection(nn.Linear(channels, out_channels))


def _init_projection(linear: nn.Linear) -> nn.Linear:
    # Xavier's bound of query, key and value as the one matrix they are in torch's own attention.
    nn.init.xavier_uniform_(linear.weight, gain=0.5**0.5)
    nn.init.zeros_(linear.bias)
    return linear


@torch.no_grad()
def summed_attention(
    query: Tensor, key: Tensor, valid: Tensor, chosen: Tensor, mebibytes: float = 64
) -> tuple[Tensor, Tensor]:
    """What the chosen queries of each image attend to, summed; and how scattered each of them does.

    Args:
        query: ``(N, M, K, d)``.
        key: ``(N, M, S, d)``.
        valid: ``(N, S)`` bool.
        chosen: ``(N, K)`` bool.
        mebibytes: how large the logits and the softmax of as many queries as are taken at once may be
            together; one query is always taken.

    Returns:
        ``(N, M, S)``, which sums to the number of chosen queries; and the entropy of :class:`Decoded`.
    """
    _, heads, cells, _ = key.shape
    rows = max(1, int(mebibytes * 2**20 / (2 * heads * cells * key.element_size())))
    summed, scattered = key.new_zeros(key.shape[:3]), key.new_zeros(())
    for i, wanted in enumerate(chosen):
        even = valid[i].sum().clamp(min=2).log()
        for some in query[i, :, wanted].split(rows, dim=1):
            attention = _logits(some, key[i], valid[i]).softmax(dim=-1)
            summed[i] += attention.sum(dim=1)
            scattered += torch.special.entr(attention).sum() / even
    return summed, scattered / (heads * chosen.sum())


def _logits(query: Tensor, key: Tensor, valid: Tensor) -> Tensor:
    query = query * query.shape[-1] ** -0.5
    return (query @ key.transpose(-1, -2)).masked_fill_(~valid, -math.inf)
