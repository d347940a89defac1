"""The base class of losses between the feature maps of two detectors."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import Tensor, nn

from ..layers.adapter import (
    FeatureAdapter,
    LevelChoice,
    LevelStrides,
    covered_cells,
    crop_to_common_size,
    level_choice,
    match_levels,
    teacher_maps,
    top_levels,
)
from ..layers.feature_rms import FeatureRMS
from .base import DistillLoss


class FeatureLoss(DistillLoss):
    """Base class of losses between feature maps, level by level. It matches levels, channels, grids and units.

    Reads: ``student.features``, ``teacher.features``, and ``teacher.images`` to measure the teacher's features.

    Args:
        levels: level names of the student, or pairs ``{student level: teacher level}``. None: :meth:`default_levels`.
        adapter: kind of adapter, see :class:`d2kd.layers.adapter.FeatureAdapter`. None: there is none, since the loss has
            other modules for it.
        normalize: whether features are compared in units of the teacher, see
            :class:`~d2kd.layers.feature_rms.FeatureRMS`. Published methods compare the features themselves.
        options: arguments of the next class, usually ``weight`` and ``across_processes`` of :class:`DistillLoss`.

    Attributes:
        levels: ``{student level: teacher level}``, after :meth:`setup`.
        strides: ``{student level: stride}``.
    """

    needs_ground_truth = False

    def __init__(
        self,
        *,
        levels: LevelChoice = None,
        adapter: str | None = "auto",
        normalize: bool = True,
        **options: Any,
    ):
        super().__init__(**options)
        self.level_names = level_choice(levels)
        self.adapter = adapter
        self.normalize = normalize

    def default_levels(self, student: nn.Module, teacher: nn.Module) -> dict[str, str]:
        """Return the levels that are compared if none are given: all matching ones."""
        return match_levels(student.backbone, teacher.backbone, None, self.scale)

    def convolved_levels(self, student: nn.Module, teacher: nn.Module) -> dict[str, str]:
        """Return all matching levels but those that an FPN only pools, such as p6 of an R-CNN, which repeats p5."""
        pooled = {k for k, v in top_levels(student.backbone).items() if v is LastLevelMaxPool}
        levels = match_levels(student.backbone, teacher.backbone, None, self.scale)
        return {level: match for level, match in levels.items() if level not in pooled} or levels

    def setup(self, student: nn.Module, teacher: nn.Module) -> None:
        shapes, teacher_shapes = student.backbone.output_shape(), teacher.backbone.output_shape()
        if self.level_names is None:
            self.levels = self.default_levels(student, teacher)
        else:
            self.levels = match_levels(
                student.backbone, teacher.backbone, self.level_names, self.scale
            )
        self.level_strides = LevelStrides.of(
            student.backbone, teacher.backbone, self.levels, self.scale
        )
        self.strides = self.level_strides.student
        self.channels = {
            level: teacher_shapes[match].channels for level, match in self.levels.items()
        }
        if self.adapter is not None:
            self.adapters = FeatureAdapter(shapes, teacher_shapes, self.levels, self.adapter)
        if self.normalize:
            self.rms = FeatureRMS(self.levels.values())

    def unit(self, level: str) -> Tensor | float:
        """Return the RMS of the teacher's features at a level of the student; 1 unless ``normalize``."""
        return self.rms(self.levels[level]) if self.normalize else 1.0

    def in_units(self, features: Tensor, level: str) -> Tensor:
        """Return features of a level in units of the teacher, in float32."""
        return features.float() / self.unit(level)

    def map_pairs(self, student, teacher) -> dict[str, tuple[Tensor, Tensor]]:
        """Return for each level the adapted map of the student and the teacher's, both ``(N, C, H, W)``.

        C is the teacher's; without an adapter, each side has its own. The teacher's grid is resized to the student's
        where strides differ. Neither map is in units of the teacher yet, but these are measured, see :meth:`unit`.
        """
        if self.normalize:
            self.rms.measure_once(teacher)
        targets = teacher_maps(student, teacher, self.level_strides)
        pairs = {}
        for level, target in zip(self.levels, targets, strict=True):
            features = student.features[level]
            if self.adapter is None:
                pairs[level] = crop_to_common_size(features, target)
            else:
                pairs[level] = self.adapters(features, target, level)
        return pairs

    def valid_cells(self, student, teacher) -> dict[str, Tensor]:
        """Return for each level of :meth:`map_pairs` the cells that the images cover, ``(N, H, W)`` bool."""
        cells = {}
        covered = covered_cells(student, teacher, self.level_strides)
        for level, valid in zip(self.levels, covered, strict=True):
            # Of the teacher's grid, which may have other padding.
            height, width = student.features[level].shape[-2:]
            cells[level] = valid[:, :height, :width]
        return cells

    def num_images(self, maps: Tensor) -> Tensor:
        """Return the number of images of ``(N, …)`` by which sums over images are divided, see :meth:`normalizer`."""
        (count,) = self.normalizer(torch.full((), float(len(maps)), device=maps.device))
        return count
