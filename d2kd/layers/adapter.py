"""Match feature levels of student and teacher, and map the student's features to the teacher's channels and grid."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ..utils.errors import InputError

logger = logging.getLogger(__name__)

ADAPTER_KINDS = ("auto", "1x1", "3x3", "none")


def match_levels(
    student: nn.Module,
    teacher: nn.Module,
    wanted: Sequence[str] | None = None,
    scale: int = 1,
) -> dict[str, str]:
    """Return the matching levels, ``{student level: teacher level}``, in order of stride.

    Levels match by name if their strides are equal, otherwise by stride. Levels of an FPN's top block that differ in
    kind (R-CNNs pool p6, dense detectors use a convolution) match only if they are in ``wanted``.

    Args:
        student, teacher: Detectron2 backbones.
        wanted: level names of the student, which all must match.
        scale: size of the teacher's images relative to the student's. Unless it is 1, levels match only by stride in
            the student's pixels, because equal names mean different strides.

    Raises:
        InputError: if a wanted level is missing on one side or has different strides, or if no level matches.
    """
    s, t = student.output_shape(), teacher.output_shape()
    same_size = scale == 1
    by_name = {
        name for name in s.keys() & t.keys() if same_size and s[name].stride == t[name].stride
    }
    by_stride = {shape.stride / scale: name for name, shape in t.items() if name not in by_name}
    matches = {}
    for name in sorted(s, key=lambda name: s[name].stride):
        if name in by_name:
            matches[name] = name
        elif s[name].stride in by_stride:
            matches[name] = by_stride[s[name].stride]
    if wanted is None:
        s_top, t_top = _top_levels(student), _top_levels(teacher)
        matches = {
            name: match for name, match in matches.items() if s_top.get(name) == t_top.get(match)
        }
    for name in wanted or ():
        if name in matches:
            continue
        if same_size and name in s and name in t:
            found = f"{name!r} has stride {s[name].stride} here and {t[name].stride} there"
            raise InputError("levels", found, "equal strides")
        if name in s and not same_size:
            found = f"the teacher's backbone has no level of stride {s[name].stride * scale}"
            raise InputError("levels", f"{found}, for {name!r}", f"one, of {_listed(t)}")
        side, has = ("student", s) if name not in s else ("teacher", t)
        raise InputError("levels", f"the {side}'s backbone has no {name!r}", f"of {', '.join(has)}")
    if not matches or (wanted is not None and not wanted):
        raise InputError(
            "levels",
            f"student {_listed(s)} and teacher {_listed(t)} share none",
            "at least one level in common, by name or by stride",
        )
    return {name: matches[name] for name in (matches if wanted is None else wanted)}


def _listed(shapes: Mapping[str, ShapeSpec]) -> str:
    return ", ".join(f"{name} (stride {shape.stride})" for name, shape in shapes.items())


def _top_levels(backbone: nn.Module) -> dict[str, type]:
    """Return the levels from an FPN's top block, with the type of the block."""
    block = getattr(backbone, "top_block", None)
    if block is None:
        return {}
    shapes = backbone.output_shape()
    names = sorted(shapes, key=lambda name: shapes[name].stride)[-block.num_levels :]
    return dict.fromkeys(names, type(block))


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
        h, w = (min(a, b) for a, b in zip(student.shape[-2:], teacher.shape[-2:], strict=True))
        return self.convs[level](student)[..., :h, :w], teacher[..., :h, :w]
