"""Bringing a student's feature maps to the teacher's channels and grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ..errors import InputError

KINDS = ("auto", "1x1", "3x3", "none")


def common_levels(
    student: Mapping[str, ShapeSpec],
    teacher: Mapping[str, ShapeSpec],
    wanted: Sequence[str] | None = None,
) -> list[str]:
    """The levels both backbones have, in order of stride; all of ``wanted`` where it is given.

    Raises:
        InputError: a wanted level is missing on one side, strides differ, or there is none in common.
    """
    both = [level for level in student if level in teacher]
    for level in wanted or ():
        if level not in both:
            side, has = ("student", student) if level not in student else ("teacher", teacher)
            raise InputError(
                "levels", f"the {side}'s backbone has no {level!r}", f"of {', '.join(has)}"
            )
    levels = list(wanted) if wanted is not None else sorted(both, key=lambda p: student[p].stride)
    if not levels:
        raise InputError(
            "levels",
            f"student {', '.join(student)} and teacher {', '.join(teacher)} share none",
            "at least one level in common",
        )
    for level in levels:
        ours, theirs = student[level].stride, teacher[level].stride
        if ours != theirs:
            raise InputError(
                "levels", f"{level!r} has stride {ours} here and {theirs} there", "equal strides"
            )
    return levels


class FeatureAdapter(nn.Module):
    """Student maps to teacher channels, level by level; trained with the student, gone afterwards.

    Args:
        student, teacher: ``output_shape()`` of both backbones.
        levels: the levels to adapt.
        kind: "auto" (nothing where the channels are equal, else 1x1), "1x1", "3x3", or "none".

    Raises:
        InputError: no such kind, or "none" where channels differ.
    """

    def __init__(
        self,
        student: Mapping[str, ShapeSpec],
        teacher: Mapping[str, ShapeSpec],
        levels: Sequence[str],
        kind: str = "auto",
    ):
        super().__init__()
        if kind not in KINDS:
            raise InputError("adapter", kind, " or ".join(KINDS))
        self.convs = nn.ModuleDict()
        for level in levels:
            ours, theirs = student[level].channels, teacher[level].channels
            if kind == "none" and ours != theirs:
                raise InputError(
                    "adapter", f"none, but {level!r} has {ours} and {theirs} channels", "auto"
                )
            if kind == "none" or (kind == "auto" and ours == theirs):
                self.convs[level] = nn.Identity()
            else:
                side = 3 if kind == "3x3" else 1
                self.convs[level] = nn.Conv2d(ours, theirs, side, padding=side // 2)

    def forward(self, student: Tensor, teacher: Tensor, level: str) -> tuple[Tensor, Tensor]:
        """Both maps ``(N, C, H, W)`` of one level in the teacher's channels, on the grid they share.

        Detectors that pad to other multiples differ only below and to the right of the images.
        """
        h, w = (min(a, b) for a, b in zip(student.shape[-2:], teacher.shape[-2:], strict=True))
        return self.convs[level](student)[..., :h, :w], teacher[..., :h, :w]
