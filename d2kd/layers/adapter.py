"""Match feature levels of student and teacher, and bring their maps to the same channels and grid."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ..utils.errors import InputError
from .masks import cells_in_images, valid_cells

logger = logging.getLogger(__name__)

LevelChoice = Sequence[str] | Mapping[str, str] | None
"""The argument ``levels`` of losses: names of the student's levels, pairs of levels, or None for all that match."""

ADAPTER_KINDS = ("auto", "1x1", "3x3", "none")


def level_choice(levels: LevelChoice) -> LevelChoice:
    """Return a copy in plain Python types, since a recipe's lists and dicts belong to OmegaConf."""
    if levels is None:
        return None
    if isinstance(levels, Mapping):
        return {str(name): str(match) for name, match in levels.items()}
    return list(levels)


def match_levels(
    student: nn.Module,
    teacher: nn.Module,
    wanted: LevelChoice = None,
    scale: float = 1,
) -> dict[str, str]:
    """Return the matching levels, ``{student level: teacher level}``, in order of stride.

    Levels match by name if their strides are equal, otherwise by stride. Levels of an FPN's top block that differ in
    kind (R-CNNs pool p6, dense detectors use a convolution) match only if they are in ``wanted``. If no strides are
    equal, as of a transformer with patches of 14 pixels, each level matches the one of the nearest stride, see
    :func:`_nearest_strides`, and :func:`teacher_maps` resizes.

    Args:
        student, teacher: Detectron2 backbones.
        wanted: level names of the student, which all must match; or ``{student level: teacher level}``, pairs of any
            strides, of which :func:`teacher_maps` resizes those with other grids.
        scale: size of the teacher's images relative to the student's. Unless it is 1, levels match only by stride in
            the student's pixels, because equal names mean different strides. If it is no power of two, they match by
            the nearest stride.

    Raises:
        InputError: if a wanted level is missing on one side or has different strides, or if no level matches.
    """
    s, t = student.output_shape(), teacher.output_shape()
    if isinstance(wanted, Mapping) and wanted:
        return _checked_pairs(s, t, wanted)
    s_top, t_top = top_levels(student), top_levels(teacher)

    def comparable(level: str, match: str) -> bool:
        return wanted is not None or s_top.get(level) == t_top.get(match)

    same_size = scale == 1
    by_name = {
        name for name in s.keys() & t.keys() if same_size and s[name].stride == t[name].stride
    }
    by_stride = {shape.stride / scale: name for name, shape in t.items() if name not in by_name}
    matches = {}
    if is_power_of_two(scale):
        matches = {name: by_stride[s[name].stride] for name in s if s[name].stride in by_stride}
        matches |= {name: name for name in by_name}
        matches = {name: match for name, match in matches.items() if comparable(name, match)}
    if not matches:
        matches = _nearest_strides(s, t, scale, comparable)
    in_order = sorted(s, key=lambda name: s[name].stride)
    matches = {name: matches[name] for name in in_order if name in matches}
    for name in wanted or ():
        if name in matches:
            continue
        if same_size and name in s and name in t:
            found = f"{name!r} has stride {s[name].stride} here and {t[name].stride} there"
            raise InputError("levels", found, "equal strides")
        if name in s and not same_size:
            near = "" if is_power_of_two(scale) else "to be matched within a factor of sqrt(2) "
            found = (
                f"the teacher's backbone has no level {near}of stride {s[name].stride * scale:g}"
            )
            raise InputError("levels", f"{found}, for {name!r}", f"one, of {_listed(t)}")
        raise _no_level(*(("student", s) if name not in s else ("teacher", t)), name)
    if not matches or (wanted is not None and not wanted):
        raise InputError(
            "levels",
            f"student {_listed(s)} and teacher {_listed(t)} share none",
            "at least one level in common, by name or by stride",
        )
    return {name: matches[name] for name in (matches if wanted is None else wanted)}


def _checked_pairs(
    student: Mapping[str, ShapeSpec], teacher: Mapping[str, ShapeSpec], pairs: Mapping[str, str]
) -> dict[str, str]:
    for level, match in pairs.items():
        for side, has, name in (("student", student, level), ("teacher", teacher, match)):
            if name not in has:
                raise _no_level(side, has, name)
    return dict(pairs)


def _no_level(side: str, has: Mapping[str, ShapeSpec], name: str) -> InputError:
    return InputError("levels", f"the {side}'s backbone has no {name!r}", f"of {', '.join(has)}")


def is_power_of_two(scale: float) -> bool:
    """Return whether cells of the teacher's levels lie on those of the student's, so that no map is resized."""
    return math.log2(scale).is_integer()


def _nearest_strides(
    student: Mapping[str, ShapeSpec],
    teacher: Mapping[str, ShapeSpec],
    scale: float,
    comparable: Callable[[str, str], bool],
) -> dict[str, str]:
    """Match levels whose strides in pixels of the teacher's images are nearest, on a logarithmic scale.

    They differ by at most a factor of sqrt(2): half the step between the levels of a pyramid. The nearest pairs are
    matched first, and no level is matched twice. Of two levels of the teacher that are equally near, the finer one is
    taken; of those with one stride, the last.
    """
    pairs = sorted(
        # Rounded, so that ties are ties.
        (
            round(abs(math.log2(t.stride / (s.stride * scale))), 6),
            t.stride,
            name,
            -place,
            match,
        )
        for name, s in student.items()
        for place, (match, t) in enumerate(teacher.items())
        if comparable(name, match)
    )
    matches: dict[str, str] = {}
    for octaves, _, name, _, match in pairs:
        if octaves <= 0.5 and name not in matches and match not in matches.values():
            matches[name] = match
    return matches


@dataclass(frozen=True)
class LevelStrides:
    """The strides of matching levels.

    Attributes:
        levels: ``{student level: teacher level}``, see :func:`match_levels`.
        student, teacher: stride of each level in pixels of the detector's images, by the student's level.
        scale: size of the teacher's images relative to the student's.
    """

    levels: dict[str, str]
    student: dict[str, int]
    teacher: dict[str, int]
    scale: float = 1

    @classmethod
    def of(
        cls, student: nn.Module, teacher: nn.Module, levels: Mapping[str, str], scale: float = 1
    ) -> LevelStrides:
        """Return the strides of the levels of two Detectron2 backbones."""
        s, t = student.output_shape(), teacher.output_shape()
        return cls(
            dict(levels),
            {level: s[level].stride for level in levels},
            {level: t[match].stride for level, match in levels.items()},
            scale,
        )

    def is_resized(self, level: str) -> bool:
        """Return whether the cells of both maps differ, so that the teacher's map is resized."""
        return self.ratio(level) != 1

    def ratio(self, level: str) -> float:
        """Return the teacher's stride divided by the student's, both in pixels of the student's images."""
        return self.teacher[level] / (self.student[level] * self.scale)


def teacher_maps(student, teacher, strides: LevelStrides) -> list[Tensor]:
    """Return the teacher's map of each level, ``(N, C, H, W)``, whose cells are those of the student's level.

    Where strides are equal in the student's pixels, it is the feature map itself. Otherwise it is resized, see
    :func:`resize_map`. Sizes may differ by cells in the padding.

    Args:
        student, teacher: the outputs of both detectors.
        strides: of the levels.
    """
    maps = []
    for level, match in strides.levels.items():
        features = teacher.features[match]
        if strides.is_resized(level):
            features = resize_map(
                features,
                strides.teacher[level],
                teacher.images.image_sizes,
                tuple(student.features[level].shape[-2:]),
                strides.student[level],
                teacher.student_image_sizes or teacher.images.image_sizes,
            )
        maps.append(features)
    return maps


def covered_cells(student, teacher, strides: LevelStrides) -> list[Tensor]:
    """Return which cells of :func:`teacher_maps` the images cover, ``(N, H, W)`` bool for each level."""
    images = teacher.images
    sizes, valid = {}, {}
    for level, match in strides.levels.items():
        if strides.is_resized(level):
            size = tuple(student.features[level].shape[-2:])
            padded = [cells * strides.student[level] for cells in size]
            image_sizes = teacher.student_image_sizes or images.image_sizes
            (valid[level],) = valid_cells(image_sizes, padded, [size], images.tensor.device)
        else:
            sizes[level] = tuple(teacher.features[match].shape[-2:])
    if sizes:
        valid |= dict(zip(sizes, cells_in_images(images, list(sizes.values())), strict=True))
    return [valid[level] for level in strides.levels]


def resize_map(
    features: Tensor,
    stride: float,
    image_sizes: Sequence[tuple[int, int]],
    new_size: tuple[int, int],
    new_stride: float,
    new_image_sizes: Sequence[tuple[int, int]],
) -> Tensor:
    """Resize a feature map to the grid of the same images in another size, by bilinear interpolation.

    Cells correspond by the image, whatever the padding of both batches: a point of an image is the same fraction of
    its width and height in both sizes. Centres of cells are those of :mod:`d2kd.layers.masks` (``align_corners=False``).
    Cells in the padding are never read: beyond the centres of the first and last cell that the image covers, the map
    is constant.

    Args:
        features: ``(N, C, H, W)``.
        stride: its stride in pixels.
        image_sizes: (height, width) of each image without padding.
        new_size, new_stride, new_image_sizes: size of the new map, its stride, and the images' other sizes.

    Returns:
        ``(N, C, *new_size)``, in the precision of ``features``.
    """
    # (2, N, 2), in one copy to the device.
    sizes = torch.tensor([image_sizes, new_image_sizes], device=features.device).float()
    points = []
    for axis, (cells, new_cells) in enumerate(zip(features.shape[-2:], new_size)):
        side, new_side = sizes[..., axis, None]
        centres = (torch.arange(new_cells, device=features.device) + 0.5) * new_stride
        # In cells of the map: 0.5 is the centre of the first.
        inside = centres * side / new_side / stride
        last = (side / stride).ceil() - 0.5
        points.append(2 * torch.minimum(inside, last) / cells - 1)  # -1 and 1 are the map's borders
    y, x = points
    grid = torch.stack(torch.broadcast_tensors(x[:, None], y[..., None]), dim=-1)
    # In float32: the points would be too coarse in half precision.
    resized = F.grid_sample(features.float(), grid, padding_mode="border", align_corners=False)
    return resized.to(features.dtype)


def _listed(shapes: Mapping[str, ShapeSpec]) -> str:
    return ", ".join(f"{name} (stride {shape.stride})" for name, shape in shapes.items())


def top_levels(backbone: nn.Module) -> dict[str, type]:
    """Return the levels from an FPN's top block, with the type of the block, by name."""
    block = getattr(backbone, "top_block", None)
    if block is None:
        return {}
    shapes = backbone.output_shape()
    names = sorted(shapes, key=lambda name: shapes[name].stride)[-block.num_levels :]
    return dict.fromkeys(names, type(block))


def crop_to_common_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return both maps without the lower and right cells that only one of them has."""
    h, w = (min(a, b) for a, b in zip(student.shape[-2:], teacher.shape[-2:], strict=True))
    return student[..., :h, :w], teacher[..., :h, :w]


class FeatureAdapter(nn.Module):
    """Convolutions that map the student's features to the teacher's channels, one per level.

    They are trained with the student and not part of it. The adapter of each level is logged.

    Args:
        student, teacher: ``output_shape()`` of both backbones.
        levels: ``{student level: teacher level}``, see :func:`match_levels`.
        kind: "auto" (1x1 if channels differ, otherwise none), "1x1", "3x3", or "none".

    Raises:
        InputError: if ``kind`` is unknown, or is "none" and channels differ.
    """

    def __init__(
        self,
        student: Mapping[str, ShapeSpec],
        teacher: Mapping[str, ShapeSpec],
        levels: Mapping[str, str],
        kind: str = "auto",
    ):
        super().__init__()
        if kind not in ADAPTER_KINDS:
            raise InputError("adapter", kind, " or ".join(ADAPTER_KINDS))
        self.convs = nn.ModuleDict()
        for level, match in levels.items():
            in_channels, out_channels = student[level].channels, teacher[match].channels
            if kind == "none" and in_channels != out_channels:
                raise InputError(
                    "adapter",
                    f"none, but {level!r} has {in_channels} and {out_channels} channels",
                    "auto",
                )
            if kind == "none" or (kind == "auto" and in_channels == out_channels):
                self.convs[level], name = nn.Identity(), "no adapter"
            else:
                size = 3 if kind == "3x3" else 1
                self.convs[level] = nn.Conv2d(in_channels, out_channels, size, padding=size // 2)
                name = f"{size}x{size} adapter"
            logger.info(
                "student %s (stride %d, %d channels) and teacher %s (%d channels): %s",
                level,
                student[level].stride,
                in_channels,
                match,
                out_channels,
                name,
            )

    def make_identity(self) -> None:
        """Initialize to the identity for maps that have the teacher's channels."""
        for conv in self.convs.values():
            if isinstance(conv, nn.Conv2d):
                nn.init.dirac_(conv.weight)
                nn.init.zeros_(conv.bias)

    def forward(self, student: Tensor, teacher: Tensor, level: str) -> tuple[Tensor, Tensor]:
        """Return both maps ``(N, C, H, W)`` of a level with the teacher's channels, cropped to their common size.

        Padding to different multiples changes only the lower and right borders.
        """
        return crop_to_common_size(self.convs[level](student), teacher)
