"""Checks that the predictions of two dense detectors correspond."""

from __future__ import annotations

from torch import nn

from ..utils.errors import InputError


def check_anchors(
    student: nn.Module, teacher: nn.Module, scale: float = 1, expected: str = "the same anchors"
) -> None:
    """Raise InputError unless two dense detectors have equal anchors, so that rows of their outputs correspond."""
    if scale != 1:
        raise InputError("anchors", f"a teacher of images {scale} times larger", expected)
    kinds = [type(d).__name__ for d in (student, teacher)]
    if not all(hasattr(d, "anchor_generator") for d in (student, teacher)):
        raise InputError("anchors", f"student {kinds[0]}, teacher {kinds[1]}", expected)
    student_settings, teacher_settings = (
        (
            [d.backbone.output_shape()[level].stride for level in d.head_in_features],
            [cell.tolist() for cell in d.anchor_generator.cell_anchors],
            d.backbone.size_divisibility,
            list(getattr(d.anchor_generator, "strides", ())),
            getattr(d.anchor_generator, "offset", None),
        )
        for d in (student, teacher)
    )
    compared = "strides", "anchors of a cell", "padding", "strides of anchors", "offset of anchors"
    for what, a, b in zip(compared, student_settings, teacher_settings, strict=True):
        if a != b:
            if what == "anchors of a cell":
                a, b = ([len(cell) for cell in side] for side in (a, b))
                what = "anchors of a cell" if a != b else "sizes of anchors"
                a, b = (a, b) if a != b else ("one set", "another")
            raise InputError("anchors", f"{what}: student {a}, teacher {b}", expected)


def check_distributions(student: nn.Module, teacher: nn.Module) -> None:
    """Raise InputError unless both detectors are GFLs with the same number of bins."""
    bins = [getattr(getattr(d, "head", None), "reg_max", None) for d in (student, teacher)]
    if None in bins or bins[0] != bins[1]:
        names = [type(d).__name__ for d in (student, teacher)]
        found = f"student {names[0]} with reg_max {bins[0]}, teacher {names[1]} with {bins[1]}"
        raise InputError("distributions", found, "two GFLs with the same reg_max")
