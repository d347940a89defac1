"""Bringing a student's feature maps to the teacher's channels and grid."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ..utils.errors import InputError

logger = logging.getLogger(__name__)

KINDS = ("auto", "1x1", "3x3", "none")


def match_levels(
    student: nn.Module,
    teacher: nn.Module,
    wanted: Sequence[str] | None = None,
    scale: int = 1,
) -> dict[str, str]:
    """Which level of the student's backbone is which of the teacher's, in order of stride.

    Levels match by name where their strides are equal, else by stride. Left out unless wanted are levels on top of
    the pyramid that both make in their own ways, as R-CNNs pool p6 and dense detectors convolve it.

    Args:
        student, teacher: Detectron2 backbones.
        wanted: level names of the student; all of them must match.
        scale: how many times larger the teacher's images are. Unless it is 1, names mean other strides on both
            sides, and levels match by their stride in the student's pixels alone.

    Raises:
        InputError: a wanted level is missing on one side or has a stride of its own, or nothing matches.
    """
    ours, theirs = student.output_shape(), teacher.output_shape()
    same_size = scale == 1
    by_name = {
        name
        for name in ours.keys() & theirs.keys()
        if same_size and ours[name].stride == theirs[name].stride
    }
    by_stride = {
        shape.stride / scale: name for name, shape in theirs.items() if name not in by_name
    }
    matches = {}
    for name in sorted(ours, key=lambda name: ours[name].stride):
        if name in by_name:
            matches[name] = name
        elif ours[name].stride in by_stride:
            matches[name] = by_stride[ours[name].stride]
    if wanted is None:
        tops, other = _top_levels(student), _top_levels(teacher)
        matches = {
            name: match for name, match in matches.items() if tops.get(name) == other.get(match)
        }
    for name in wanted or ():
        if name in matches:
            continue
        if same_size and name in ours and name in theirs:
            found = f"{name!r} has stride {ours[name].stride} here and {theirs[name].stride} there"
            raise InputError("levels", found, "equal strides")
        if name in ours and not same_size:
            found = f"the teacher's backbone has no level of stride {ours[name].stride * scale}"
            raise InputError("levels", f"{found}, for {name!r}", f"one, of {_listed(theirs)}")
        side, has = ("student", ours) if name not in ours else ("teacher", theirs)
        raise InputError("levels", f"the {side}'s backbone has no {name!r}", f"of {', '.join(has)}")
    if not matches or (wanted is not None and not wanted):
        raise InputError(
            "levels",
            f"student {_listed(ours)} and teacher {_listed(theirs)} share none",
            "at least one level in common, by name or by stride",
        )
    return {name: matches[name] for name in (matches if wanted is None else wanted)}


def _listed(shapes: Mapping[str, ShapeSpec]) -> str:
    return ", ".join(f"{name} (stride {shape.stride})" for name, shape in shapes.items())


def _top_levels(backbone: nn.Module) -> dict[str, type]:
    """Levels that an FPN's top block makes, and its kind."""
    block = getattr(backbone, "top_block", None)
    if block is None:
        return {}
    shapes = backbone.output_shape()
    names = sorted(shapes, key=lambda name: shapes[name].stride)[-block.num_levels :]
    return dict.fromkeys(names, type(block))


class FeatureAdapter(nn.Module):
    """Student maps to teacher channels, level by level; trained with the student, gone afterwards.

    What is adapted how is logged.

    Args:
        student, teacher: ``output_shape()`` of both backbones.
        levels: {level of the student: the teacher's}, see :func:`match_levels`.
        kind: "auto" (nothing where the channels are equal, else 1x1), "1x1", "3x3", or "none".

    Raises:
        InputError: no such kind, or "none" where channels differ.
    """

    def __init__(
        self,
        student: Mapping[str, ShapeSpec],
        teacher: Mapping[str, ShapeSpec],
        levels: Mapping[str, str],
        kind: str = "auto",
    ):
        super().__init__()
        if kind not in KINDS:
            raise InputError("adapter", kind, " or ".join(KINDS))
        self.convs = nn.ModuleDict()
        for level, match in levels.items():
            ours, theirs = student[level].channels, teacher[match].channels
            if kind == "none" and ours != theirs:
                raise InputError(
                    "adapter", f"none, but {level!r} has {ours} and {theirs} channels", "auto"
                )
            if kind == "none" or (kind == "auto" and ours == theirs):
                self.convs[level] = nn.Identity()
            else:
                side = 3 if kind == "3x3" else 1
                self.convs[level] = nn.Conv2d(ours, theirs, side, padding=side // 2)
            logger.info(
                "student %s (stride %d, %d channels) and teacher %s (%d channels): %s",
                level,
                student[level].stride,
                ours,
                match,
                theirs,
                "no adapter"
                if isinstance(self.convs[level], nn.Identity)
                else f"{side}x{side} adapter",
            )

    def make_identity(self) -> None:
        """Pass on maps of the teacher's channels as they are."""
        for conv in self.convs.values():
            if isinstance(conv, nn.Conv2d):
                nn.init.dirac_(conv.weight)
                nn.init.zeros_(conv.bias)

    def forward(self, student: Tensor, teacher: Tensor, level: str) -> tuple[Tensor, Tensor]:
        """Both maps ``(N, C, H, W)`` of one level in the teacher's channels, on the grid they share.

        Detectors that pad to other multiples differ only below and to the right of the images.
        """
        h, w = (min(a, b) for a, b in zip(student.shape[-2:], teacher.shape[-2:], strict=True))
        return self.convs[level](student)[..., :h, :w], teacher[..., :h, :w]
