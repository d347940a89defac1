"""Attention of queries to all cells of a feature pyramid, and sine embeddings of positions.

Notation: N images, K queries per image, S cells of all levels, C channels, M heads of d = C / M channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..utils.errors import InputError


def sine_position_embedding(points: Tensor, channels: int) -> Tensor:
    """Return sine position embeddings of points (DETR, arXiv 2005.12872).

    Args:
        points: ``(..., 2)``, x and y as fractions of image width and height, which correspond to 2 pi.
        channels: number of channels C. The first C // 2 encode y, the others x; sines and cosines alternate.

    Returns:
        ``(..., C)`` float32.
    """
    return torch.cat([*_sine_embeddings(*points.float().flip(-1).unbind(-1), channels)], dim=-1)


@dataclass
class CellPositions:
    """Sine position embeddings of the cells of all levels, as in :func:`sine_position_embedding`.

    Coordinates are counts of valid cells, scaled so that the last valid row and column are at 2 pi. Rows and columns
    are stored separately: H + W vectors instead of H W.

    Attributes:
        rows, columns: for each level ``(N, H, C // 2)`` and ``(N, W, C - C // 2)``.
    """

    rows: list[Tensor]
    columns: list[Tensor]

    @classmethod
    def from_masks(cls, valid: Iterable[Tensor], channels: int) -> CellPositions:
        """Create positions from masks ``(N, H, W)`` of each level, whose first rows and columns are valid."""
        positions = cls([], [])
        for rows, columns in map(_normalized_coordinates, valid):
            rows, columns = _sine_embeddings(rows[:, :, 0], columns[:, 0], channels)
            positions.rows.append(rows)
            positions.columns.append(columns)
        return positions

    def project(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Apply a linear map, weight ``(C', C)`` and bias ``(C',)``, to each cell's position.

        Returns:
            ``(N, S, C')``, without meaning in the padding.
        """
        w_row, w_column = weight.split([x[0].shape[-1] for x in (self.rows, self.columns)], dim=1)
        levels = (
            F.linear(rows, w_row, bias)[:, :, None] + F.linear(columns, w_column)[:, None]
            for rows, columns in zip(self.rows, self.columns, strict=True)
        )
        return torch.cat([level.flatten(1, 2) for level in levels], dim=1)


def _normalized_coordinates(valid: Tensor) -> Iterable[Tensor]:
    """Yield the y and x coordinates of cells, ``(N, H, W)`` each, 1 in the last valid row and column."""
    for axis in (1, 2):
        count = valid.cumsum(axis, dtype=torch.float32)
        last = count.narrow(axis, count.shape[axis] - 1, 1)
        yield count / (last + 1e-6)


def _sine_embeddings(rows: Tensor, columns: Tensor, channels: int) -> Iterable[Tensor]:
    """Yield the row channels and the column channels, as a new last dimension."""
    for position, width in ((rows, channels // 2), (columns, channels - channels // 2)):
        index = torch.arange(width, device=position.device)
        period = 10000 ** (2 * index.div(2, rounding_mode="floor") / width)
        angle = (position * 2 * math.pi)[..., None] / period
        yield torch.where(index % 2 == 0, angle.sin(), angle.cos())


@dataclass
class DecoderOutput:
    """Output of a decoder layer.

    Attributes:
        queries: ``(N, K, C)``.
        values: ``(N, M, S, d)``, projected values of each head.
        attention: ``(N, M, S)`` without gradient, summed over the selected queries of an image; None without a mask.
        entropy: scalar, at most 1: entropy of the attention of each selected query, divided by that of uniform
            attention to the valid cells, averaged over heads and queries; NaN if no query is selected.
    """

    queries: Tensor
    values: Tensor
    attention: Tensor | None = None
    entropy: Tensor | None = None


class InstanceDecoderLayer(nn.Module):
    """Post-norm transformer decoder layer without self-attention: cross-attention and an MLP.

    Positions are projected and added to the keys, and to the queries if these have positions.

    Args:
        channels: C.
        heads: M.
        hidden: hidden units of the MLP. None: 4 C.
        query_positions: whether queries have positions (as in Conditional DETR, arXiv 2108.06152). They use the
            position projection of the keys, and the query projection is initialized as a copy of the key projection.
            So a query initially attends most to cells at similar positions.
        normalize_keys: whether tokens are normalised over channels before the key projection.

    Raises:
        InputError: if ``heads`` does not divide ``channels``.
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
            # The mean square of sines is 1/2. This gain gives positions the scale of normalised features.
            nn.init.orthogonal_(self.position.weight, 2**0.5)
            nn.init.zeros_(self.position.bias)
        nn.init.zeros_(self.out.bias)

    def forward(
        self,
        queries: Tensor,
        tokens: Tensor,
        positions: CellPositions,
        valid: Tensor,
        query_mask: Tensor | None = None,
        max_memory_mib: float = 64,
        query_positions: Tensor | None = None,
    ) -> DecoderOutput:
        """Attend to the cells of a pyramid.

        No tensor of size K x S is created if PyTorch has a fused attention for the device.

        Args:
            queries: ``(N, K, C)``.
            tokens: ``(N, S, C)``, features of all cells.
            positions: their positions, with C channels.
            valid: ``(N, S)`` bool, cells to attend to; at least one per image.
            query_mask: ``(N, K)`` bool mask of the queries whose attention is returned, see :func:`summed_attention`.
            max_memory_mib: memory limit of that computation, see :func:`summed_attention`.
            query_positions: ``(N, K, C)``.
        """
        query, key = self._query(queries, query_positions), self._key(tokens, positions)
        value = split_heads(self.value(tokens), self.heads)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=valid[:, None, None])
        decoded = self.attention_norm(queries + self.out(attended.transpose(1, 2).flatten(2)))
        decoded = DecoderOutput(self.perceptron_norm(decoded + self.perceptron(decoded)), value)
        if query_mask is not None:
            decoded.attention, decoded.entropy = summed_attention(
                query, key, valid, query_mask, max_memory_mib
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
        """Return attention logits of all queries, ``(N, M, K, S)``, -inf in invalid cells."""
        query, key = self._query(queries, query_positions), self._key(tokens, positions)
        return _logits(query, key, valid[:, None, None])

    def _query(self, queries: Tensor, positions: Tensor | None) -> Tensor:
        if positions is not None:
            queries = queries + self.position(positions)
        return split_heads(self.query(queries), self.heads)

    def _key(self, tokens: Tensor, positions: CellPositions) -> Tensor:
        if self.normalize_keys:
            tokens = F.layer_norm(tokens, tokens.shape[-1:])
        # K (x + P y + b) + c = K x + (K P) y + K b + c. The terms of y are computed from rows and columns separately,
        # and K x is added in place, so there is one tensor of the tokens' size instead of three.
        weight = self.key.weight @ self.position.weight
        bias = self.key.weight @ self.position.bias + self.key.bias
        key = positions.project(weight, bias)
        key.baddbmm_(tokens, self.key.weight.t().expand(len(tokens), -1, -1))
        return split_heads(key, self.heads)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Split channels into heads: ``(N, L, C)`` to ``(N, M, L, d)``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def value_projection(channels: int, out_channels: int) -> nn.Linear:
    """Return a linear layer with the initialization of the decoder's projections."""
    return _init_projection(nn.Linear(channels, out_channels))


def _init_projection(linear: nn.Linear) -> nn.Linear:
    # The bound of nn.MultiheadAttention, which initializes query, key and value as one matrix.
    nn.init.xavier_uniform_(linear.weight, gain=0.5**0.5)
    nn.init.zeros_(linear.bias)
    return linear


@torch.no_grad()
def summed_attention(
    query: Tensor, key: Tensor, valid: Tensor, query_mask: Tensor, max_memory_mib: float = 64
) -> tuple[Tensor, Tensor]:
    """Return the attention of the selected queries, summed for each image, and its entropy.

    Args:
        query: ``(N, M, K, d)``.
        key: ``(N, M, S, d)``.
        valid: ``(N, S)`` bool.
        query_mask: ``(N, K)`` bool, the selected queries. A mask on the CPU avoids synchronization.
        max_memory_mib: limit for logits and softmax of the queries of one chunk; a chunk has at least one query.

    Returns:
        ``(N, M, S)``, whose sum over cells is the number of selected queries; and the entropy, see :class:`DecoderOutput`.
    """
    _, heads, cells, _ = key.shape
    rows = max(1, int(max_memory_mib * 2**20 / (2 * heads * cells * key.element_size())))
    summed, total_entropy = key.new_zeros(key.shape[:3]), key.new_zeros(())
    counts = query_mask.sum(dim=1).tolist()
    slots = query_mask.nonzero()[:, 1].to(key.device, non_blocking=True).split(counts)
    for i, selected in enumerate(slots):
        uniform_entropy = valid[i].sum().clamp(min=2).log()
        for chunk in query[i, :, selected].split(rows, dim=1):
            attention, entropy = _attention_and_entropy(chunk, key[i], valid[i])
            summed[i] += attention
            total_entropy += entropy / uniform_entropy
    return summed, total_entropy / (heads * sum(counts))


def _attention_and_entropy(query: Tensor, key: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return attention ``(M, S)`` and entropy, summed over queries. Larger tensors are freed on return."""
    attention = _logits(query, key, valid).softmax(dim=-1)
    return attention.sum(dim=1), torch.special.entr(attention).sum()


def _logits(query: Tensor, key: Tensor, valid: Tensor) -> Tensor:
    query = query * query.shape[-1] ** -0.5
    return (query @ key.transpose(-1, -2)).masked_fill_(~valid, -math.inf)
