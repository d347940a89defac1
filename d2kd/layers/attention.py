"""Instances asked about an image: queries that attend to all cells of a feature pyramid.

Letters: N images, K queries of an image, S cells of all levels together, C channels, M heads of d = C / M
channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..utils.errors import InputError


def point_positions(points: Tensor, channels: int) -> Tensor:
    """Where a point lies in its image, in sines (DETR, arXiv 2005.12872).

    Args:
        points: ``(..., 2)``, x and y as parts of the image's width and height, which are 2 pi.
        channels: half of them, rounded down, tell the row, the others the column; sine and cosine by turns.

    Returns:
        ``(..., channels)`` float32.
    """
    return torch.cat([*_sines(*points.float().flip(-1).unbind(-1), channels)], dim=-1)


@dataclass
class CellPositions:
    """Where the valid cells of all levels lie, by row and by column, told as :func:`point_positions` tells it of points.

    Coordinates count valid cells, and are scaled so that the last valid row and column have 2 pi. A cell is told by its
    row and its column: H + W vectors say what H W would.

    Attributes:
        rows, columns: of each level ``(N, H, C // 2)`` and ``(N, W, C - C // 2)``.
    """

    rows: list[Tensor]
    columns: list[Tensor]

    @classmethod
    def of(cls, valid: Iterable[Tensor], channels: int) -> CellPositions:
        """Of levels ``(N, H, W)`` bool, whose valid cells are in the first rows and columns; C = channels."""
        positions = cls([], [])
        for rows, columns in map(_places, valid):
            rows, columns = _sines(rows[:, :, 0], columns[:, 0], channels)
            positions.rows.append(rows)
            positions.columns.append(columns)
        return positions

    def mapped(self, weight: Tensor, bias: Tensor) -> Tensor:
        """A linear map of each cell's position: ``(N, S, C')``, of weight ``(C', C)`` and bias ``(C',)``.

        In the padding it tells nothing.
        """
        of_row, of_column = weight.split([x[0].shape[-1] for x in (self.rows, self.columns)], dim=1)
        levels = (
            F.linear(rows, of_row, bias)[:, :, None] + F.linear(columns, of_column)[:, None]
            for rows, columns in zip(self.rows, self.columns, strict=True)
        )
        return torch.cat([level.flatten(1, 2) for level in levels], dim=1)


def _places(valid: Tensor) -> Iterable[Tensor]:
    """How far down and how far right a cell lies, ``(N, H, W)`` each, 1 in the last valid row and column."""
    for axis in (1, 2):
        count = valid.cumsum(axis, dtype=torch.float32)
        last = count.narrow(axis, count.shape[axis] - 1, 1)
        yield count / (last + 1e-6)


def _sines(rows: Tensor, columns: Tensor, channels: int) -> Iterable[Tensor]:
    """The channels that tell the row and those that tell the column, behind the dimensions of either."""
    for place, width in ((rows, channels // 2), (columns, channels - channels // 2)):
        index = torch.arange(width, device=place.device)
        period = 10000 ** (2 * index.div(2, rounding_mode="floor") / width)
        angle = (place * 2 * math.pi)[..., None] / period
        yield torch.where(index % 2 == 0, angle.sin(), angle.cos())


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

    Queries do not see each other. Positions are projected and added to the keys alone, unless queries have
    some, too.

    Args:
        channels: C.
        heads: M.
        hidden: of the perceptron; None: 4 C.
        query_positions: whether queries have positions (as in Conditional DETR, arXiv 2108.06152). They pass
            the keys' own position projection, and the query projection begins as a copy of the key projection:
            from the first step on, a query looks most at cells whose positions are like its own.
        normalize_keys: whether tokens are normalised over their channels where they become keys.

    Raises:
        InputError: the heads do not divide the channels.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        hidden: int | None = None,
        *,
        query_positions: bool = False,
        normalize_keys: bool = False,
    ):
        super().__init__()
        if heads < 1 or channels % heads:
            raise InputError("heads", heads, f"a divisor of {channels} channels")
        self.heads, self.normalize_keys = heads, normalize_keys
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
        if query_positions:
            self.query.load_state_dict(self.key.state_dict())
            # Sines have a mean square of 1/2: positions begin as strong as normalised features.
            nn.init.orthogonal_(self.position.weight, 2**0.5)
            nn.init.zeros_(self.position.bias)
        nn.init.zeros_(self.out.bias)

    def forward(
        self,
        queries: Tensor,
        tokens: Tensor,
        positions: CellPositions,
        valid: Tensor,
        chosen: Tensor | None = None,
        mebibytes: float = 64,
        query_positions: Tensor | None = None,
    ) -> Decoded:
        """Ask a pyramid.

        No tensor of all queries and cells is formed where PyTorch has a fused attention for the device.

        Args:
            queries: ``(N, K, C)``.
            tokens: ``(N, S, C)``, cells of all levels.
            positions: theirs, C channels long.
            valid: ``(N, S)`` bool, which cells may be read; at least one of each image.
            chosen: ``(N, K)`` bool, queries whose attention is wanted; best on the CPU, see
                :func:`summed_attention`.
            mebibytes: what that may hold at a time, see :func:`summed_attention`.
            query_positions: ``(N, K, C)``.
        """
        query, key = self._query(queries, query_positions), self._key(tokens, positions)
        value = by_head(self.value(tokens), self.heads)
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=valid[:, None, None])
        decoded = self.attention_norm(queries + self.out(read.transpose(1, 2).flatten(2)))
        decoded = Decoded(self.perceptron_norm(decoded + self.perceptron(decoded)), value)
        if chosen is not None:
            decoded.attention, decoded.entropy = summed_attention(
                query, key, valid, chosen, mebibytes
            )
        return decoded

    @torch.no_grad()
    def logits(
        self,
        queries: Tensor,
        tokens: Tensor,
        positions: CellPositions,
        valid: Tensor,
        query_positions: Tensor | None = None,
    ) -> Tensor:
        """Attention before the softmax, of every query at once: ``(N, M, K, S)``, -inf in invalid cells."""
        query, key = self._query(queries, query_positions), self._key(tokens, positions)
        return _logits(query, key, valid[:, None, None])

    def _query(self, queries: Tensor, positions: Tensor | None) -> Tensor:
        if positions is not None:
            queries = queries + self.position(positions)
        return by_head(self.query(queries), self.heads)

    def _key(self, tokens: Tensor, positions: CellPositions) -> Tensor:
        if self.normalize_keys:
            tokens = F.layer_norm(tokens, tokens.shape[-1:])
        # K (x + P y + b) + c is K x + (K P) y + K b + c, whose second part takes rows and columns alone. The first is
        # added where that lies: one tensor as large as the tokens, not three.
        weight = self.key.weight @ self.position.weight
        bias = self.key.weight @ self.position.bias + self.key.bias
        key = positions.mapped(weight, bias)
        key.baddbmm_(tokens, self.key.weight.t().expand(len(tokens), -1, -1))
        return by_head(key, self.heads)


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
        chosen: ``(N, K)`` bool; on the CPU, nothing waits for the other tensors' device.
        mebibytes: how large the logits and the softmax of as many queries as are taken at once may be
            together; one query is always taken.

    Returns:
        ``(N, M, S)``, which sums to the number of chosen queries; and the entropy of :class:`Decoded`.
    """
    _, heads, cells, _ = key.shape
    rows = max(1, int(mebibytes * 2**20 / (2 * heads * cells * key.element_size())))
    summed, scattered = key.new_zeros(key.shape[:3]), key.new_zeros(())
    counts = chosen.sum(dim=1).tolist()
    slots = chosen.nonzero()[:, 1].to(key.device, non_blocking=True).split(counts)
    for i, wanted in enumerate(slots):
        even = valid[i].sum().clamp(min=2).log()
        for some in query[i, :, wanted].split(rows, dim=1):
            attention, entropy = _attended(some, key[i], valid[i])
            summed[i] += attention
            scattered += entropy / even
    return summed, scattered / (heads * sum(counts))


def _attended(query: Tensor, key: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Attention ``(M, S)`` and entropy, summed over queries; on return all that is as large as these is free."""
    attention = _logits(query, key, valid).softmax(dim=-1)
    return attention.sum(dim=1), torch.special.entr(attention).sum()


def _logits(query: Tensor, key: Tensor, valid: Tensor) -> Tensor:
    query = query * query.shape[-1] ** -0.5
    return (query @ key.transpose(-1, -2)).masked_fill_(~valid, -math.inf)
