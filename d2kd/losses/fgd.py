"""FGD: focal and global distillation: weighted errors in and beside objects, attention, and relations of all cells."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.structures import Instances
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..layers.adapter import LevelChoice
from ..layers.masks import MAX_CELLS_PER_CHUNK, pad_boxes
from ..utils.errors import InputError
from .base import Weight, get_weight, is_zero
from .features import FeatureLoss
from .functional import in_float32

TERMS = ("foreground", "background", "attention", "relation")

SETTINGS = {
    "two-stage": (0.5, 5e-5, 2.5e-5, 5e-5, 5e-7),
    "one-stage": (0.5, 1e-3, 5e-4, 5e-4, 5e-6),
    "fcos": (0.8, 1.6e-3, 8e-4, 8e-4, 8e-6),
}
"""Published temperature and weights of the four terms, by the family of the student."""


class FGDLoss(FeatureLoss):
    """Errors of features under masks of objects and the teacher's attention, and of attention and relations.

    On each level, of the adapted map of the student S and the teacher's T, in units of the teacher:

        attention    s(F)_hw = H W softmax_hw(mean_c |F| / t),  c(F)_c = C softmax_c(mean_hw |F| / t)
        foreground   1/N sum_nhw M s(T) sum_c c(T) (S - T)^2,   M = 1 / area of the smallest box at a cell, else 0
        background   the same with 1 / number of the image's cells without a box, where M is 0, for M
        attention    1/N (sum |c(S) - c(T)| + sum |s(S) - s(T)|)
        relation     1/N sum (R_s(S) - R_t(T))^2

    R are two :class:`RelationBlock`, trained with the student and no part of it; R_t gives the teacher no gradient.
    Each term is summed over levels and has a weight. All are sums over cells and channels: with other widths or image
    sizes than COCO's 256 channels and 800x1333 pixels, foreground and background change with C, attention with C + H W
    and relation with C H W.

    FGD, "Focal and Global Knowledge Distillation for Detectors", CVPR 2022, arXiv 2111.11837, by the authors' code.
    Published forms have ``normalize=False`` and ``published_masks=True``. Difference: the authors scale boxes by the size
    of the image without padding to the whole map, which has the padding, so in a padded image masks are larger than
    their objects and moved. Here they are scaled by the stride. Both have the authors' rounding: from the cell of the left or
    upper edge to one cell past that of the other one, with an area that also counts cells beyond the map. Padding
    without boxes is background, as published.

    N is the number of images of all processes over their number.

    Reads: ``student.features``, ``student.gt_instances``, ``teacher.features``, and ``teacher.images`` to measure units.

    Args:
        levels: level names of the student, or ``{student level: teacher level}``. None: all matching levels but those
            that are only pooled: P3-P7 of a RetinaNet, P2-P5 of a Faster R-CNN, as published.
        temperature: t. None: 0.8 for an FCOS as student, 0.5 for others.
        foreground_weight, background_weight, attention_weight, relation_weight: numbers or schedules. A term with weight
            0 is not computed. None, for two-stage students: 5e-5, 2.5e-5, 5e-5, 5e-7; FCOS: 1.6e-3, 8e-4, 8e-4, 8e-6;
            others: 1e-3, 5e-4, 5e-4, 5e-6.
        published_masks: whether boxes are scaled as published, see above.
        adapter: kind of adapter, see :class:`d2kd.layers.adapter.FeatureAdapter`.
        normalize: whether both maps are divided by the RMS of the teacher's level.
        weight: factor of all terms, a number or a schedule.
        across_processes: see :class:`~d2kd.losses.DistillLoss`.

    Raises:
        InputError: if the temperature is not positive.

    Example:
        >>> from d2kd.testing import batch, distiller, forward_losses, tiny_retinanet
        >>> losses = forward_losses(distiller(FGDLoss, tiny_retinanet), batch())
        >>> [key.rsplit("_", 1)[1] for key in losses if key.startswith("distill/")]
        ['foreground', 'background', 'attention', 'relation']
    """

    needs_ground_truth = True

    def __init__(
        self,
        *,
        levels: LevelChoice = None,
        temperature: float | None = None,
        foreground_weight: Weight | None = None,
        background_weight: Weight | None = None,
        attention_weight: Weight | None = None,
        relation_weight: Weight | None = None,
        published_masks: bool = False,
        adapter: str = "auto",
        normalize: bool = True,
        weight: Weight = 1.0,
        across_processes: bool = True,
    ):
        super().__init__(
            levels=levels,
            adapter=adapter,
            normalize=normalize,
            weight=weight,
            across_processes=across_processes,
        )
        if temperature is not None and not temperature > 0:
            raise InputError("temperature", temperature, "a positive number")
        self.temperature = temperature
        self.foreground_weight, self.background_weight = foreground_weight, background_weight
        self.attention_weight, self.relation_weight = attention_weight, relation_weight
        self.published_masks = published_masks

    default_levels = FeatureLoss.convolved_levels

    def setup(self, student: nn.Module, teacher: nn.Module) -> None:
        super().setup(student, teacher)
        dense = "fcos" if isinstance(student, FCOS) else "one-stage"
        settings = SETTINGS["two-stage" if hasattr(student, "roi_heads") else dense]
        for name, value in zip(("temperature", *(f"{x}_weight" for x in TERMS)), settings):
            if getattr(self, name) is None:
                setattr(self, name, value)
        if not is_zero(self.relation_weight):
            self.relations, self.target_relations = (
                nn.ModuleDict({k: RelationBlock(c) for k, c in self.channels.items()})
                for _ in range(2)
            )

    def forward(self, student, teacher) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        for level, (s, t) in self.map_pairs(student, teacher).items():
            foreground = self.foreground_mask(student.gt_instances, tuple(t.shape[-2:]), level)
            terms = self.level_terms(
                level, self.in_units(s, level), self.in_units(t, level), foreground
            )
            sums = {name: value + sums.get(name, 0) for name, value in terms.items()}
        images = self.num_images(t)
        return {name: self.term_weight(name) * total / images for name, total in sums.items()}

    def term_weight(self, name: str) -> float:
        """Return the present weight of a term of :data:`TERMS`."""
        return get_weight(getattr(self, f"{name}_weight"), self.progress)

    def foreground_mask(
        self, instances: Sequence[Instances], size: tuple[int, int], level: str
    ) -> Tensor:
        """Return M of the foreground on a level, ``(N, H, W)``."""
        strides = None if self.published_masks else self.strides[level]
        return foreground_mask(
            [x.gt_boxes.tensor for x in instances], [x.image_size for x in instances], size, strides
        )

    def level_terms(
        self, level: str, student: Tensor, teacher: Tensor, foreground: Tensor
    ) -> dict[str, Tensor]:
        """Return the terms of a level with weights other than 0: sums over its images, without their weights.

        Args:
            level: name of the student's.
            student, teacher: maps in units of the teacher, ``(N, C, H, W)``.
            foreground: see :func:`foreground_mask`.
        """
        terms, t = {}, self.temperature
        wanted = {name for name in TERMS if self.term_weight(name) != 0}
        if wanted & {"foreground", "background"}:
            errors = attended_error(student, teacher, t)
            if "foreground" in wanted:
                terms["foreground"] = (errors * foreground).sum()
            if "background" in wanted:
                terms["background"] = (errors * background_mask(foreground)).sum()
        if "attention" in wanted:
            terms["attention"] = attention_distance(student, teacher, t)
        if "relation" in wanted:
            blocks = self.relations[level], self.target_relations[level]
            terms["relation"] = relation_distance(student, teacher, *blocks)
        return terms


class RelationBlock(nn.Module):
    """Adds one vector to all cells of a map, made of their weighted mean (GCNet, arXiv 1904.11492).

    Attributes:
        key: makes the logits of the weights.
        transform: makes the added vector. Its last layer is 0 at first, so the block is the identity.
    """

    def __init__(self, channels: int):
        super().__init__()
        hidden = max(1, channels // 2)
        self.key = nn.Conv2d(channels, 1, 1)
        self.transform = nn.Sequential(
            nn.Conv2d(channels, hidden, 1),
            nn.LayerNorm([hidden, 1, 1]),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, 1),
        )
        nn.init.kaiming_normal_(self.key.weight, mode="fan_in", nonlinearity="relu")
        nn.init.zeros_(self.key.bias)
        self.make_identity()

    def make_identity(self) -> None:
        """Initialize to the identity."""
        nn.init.zeros_(self.transform[-1].weight)
        nn.init.zeros_(self.transform[-1].bias)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to the same shape."""
        weights = self.key(features).flatten(2).softmax(dim=2)  # (N, 1, H * W)
        context = (features.flatten(2) * weights).sum(dim=2)
        return features + self.transform(context[..., None, None])


@in_float32
def spatial_attention(features: Tensor, temperature: float) -> Tensor:
    """Return ``H W softmax(mean_c |F| / t)`` over cells, ``(N, H, W)``, of ``(N, C, H, W)``."""
    strengths = features.abs().mean(dim=1)
    cells = strengths.flatten(1) / temperature
    return cells.shape[1] * cells.softmax(dim=1).reshape(strengths.shape)


@in_float32
def channel_attention(features: Tensor, temperature: float) -> Tensor:
    """Return ``C softmax(mean_hw |F| / t)`` over channels, ``(N, C)``, of ``(N, C, H, W)``."""
    strengths = features.abs().mean(dim=(2, 3)) / temperature
    return strengths.shape[1] * strengths.softmax(dim=1)


@in_float32
def attended_error(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return ``s(T) sum_c c(T) (S - T)^2``, ``(N, H, W)``."""
    channels = channel_attention(teacher, temperature)[..., None, None]
    errors = ((student - teacher).square() * channels).sum(dim=1)
    return errors * spatial_attention(teacher, temperature)


@in_float32
def attention_distance(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the sum of absolute differences of both attentions, a scalar."""
    return sum(
        F.l1_loss(attend(student, temperature), attend(teacher, temperature), reduction="sum")
        for attend in (channel_attention, spatial_attention)
    )


@in_float32
def relation_distance(
    student: Tensor, teacher: Tensor, student_block: RelationBlock, teacher_block: RelationBlock
) -> Tensor:
    """Return the sum of squared differences of both maps after their blocks, a scalar."""
    return (student_block(student) - teacher_block(teacher)).square().sum()


@torch.no_grad()
def foreground_mask(
    boxes: Sequence[Tensor],
    image_sizes: Sequence[tuple[int, int]],
    size: tuple[int, int],
    stride: float | None,
) -> Tensor:
    """Return 1 / area of the smallest box at each cell, in cells, and 0 where there is none, ``(N, H, W)`` float32.

    Args:
        boxes: of each image, ``(G, 4)``, XYXY in absolute pixels.
        image_sizes: (height, width) of each image without padding.
        size: ``(H, W)`` of the level.
        stride: of the level, in pixels. None: a cell of an image is its size over that of the level, as published.
    """
    height, width = size
    device = boxes[0].device
    padded = pad_boxes(boxes).float()
    real = pad_sequence([torch.ones(len(x), device=device) for x in boxes], batch_first=True)
    if stride is None:
        # (N, 1, 2), in one copy to the device, for which nothing waits.
        sizes = torch.tensor([[[w, h]] for h, w in image_sizes]).to(padded, non_blocking=True)
        grid = torch.tensor([width, height]).to(padded, non_blocking=True)
        corners = padded.unflatten(2, (2, 2)) / sizes[:, :, None] * grid
    else:
        corners = padded.unflatten(2, (2, 2)) / stride
    (left, top), (right, bottom) = (
        corner.unbind(dim=2) for corner in (corners[:, :, 0].floor(), corners[:, :, 1].ceil())
    )
    values = real / ((bottom + 1 - top) * (right + 1 - left))
    rows, columns = (
        (cells >= low[..., None]) & (cells <= high[..., None])
        for cells, low, high in (
            (torch.arange(height, device=device), top, bottom),
            (torch.arange(width, device=device), left, right),
        )
    )
    mask = torch.zeros(len(boxes), *size, device=device)
    chunk = max(1, MAX_CELLS_PER_CHUNK // max(1, mask.numel()))
    for start in range(0, padded.shape[1], chunk):
        part = slice(start, start + chunk)
        inside = rows[:, part, :, None] & columns[:, part, None, :]
        drawn = inside * values[:, part, None, None]
        mask = torch.maximum(mask, drawn.amax(dim=1))
    return mask


def background_mask(foreground: Tensor) -> Tensor:
    """Return 1 / number of the image's cells without a box in these cells, and 0 elsewhere, ``(N, H, W)``."""
    empty = (foreground == 0).float()
    return empty / empty.sum(dim=(1, 2), keepdim=True).clamp(min=1)
