"""CWD: where each channel of the student is strong, compared with where the teacher's is."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..layers.adapter import LevelChoice
from ..layers.masks import cells_in_images
from ..modeling.anchors import check_anchors
from ..structures.class_map import check_shared_classes
from ..utils.errors import InputError
from .base import Weight
from .features import FeatureLoss
from .functional import in_float32, softmax_kl

SOURCES = ("features", "logits")

PADDING = -1e9
"""Stands for minus infinity, of which the divergence would be NaN."""


class CWDLoss(FeatureLoss):
    """Divergence of each channel's distribution over the cells of a level.

        loss = sum_l tau^2 / (N C) sum_nc KL(p^T_nc || p^S_nc),   p_nc = softmax over cells (F_nc / tau)

    for the adapted map of the student and the teacher's. The divergence is summed over cells and averaged over images
    and channels, so all levels have the same weight, whatever their size. Adding a constant to a channel changes
    nothing.

    CWD, "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021, arXiv 2011.13256, by the code in
    MMRazor. The authors' detection code leaves out the teacher's entropy, which changes the value but no gradient.
    Published forms have ``normalize=False`` and count the padding. Difference: with ``normalize`` features are divided by
    the RMS of the teacher's level first, so the temperature is in units of the teacher.

    With ``source="logits"`` the maps are the class logits of dense detectors, (N, A K, H, W), as in MMRazor's result for
    GFL. Only classes that both detectors have are compared.

    The number of images is that of all processes over their number; padding differs with the split of a batch.

    Reads: ``student.features``, ``teacher.features``; with ``source="logits"`` also ``pred_logits`` of both;
    ``teacher.images`` with ``normalize`` or ``valid_only``.

    Args:
        levels: level names of the student, or ``{student level: teacher level}``, for features alone. None: all matching
            levels but those that are only pooled; for logits, all levels of the head.
        source: "features" or "logits".
        temperature: tau.
        valid_only: whether cells that no image covers are left out. Published code counts them.
        adapter: kind of adapter of features, see :class:`d2kd.layers.adapter.FeatureAdapter`.
        normalize: whether the temperature of features is in units of the teacher, see above. Logits have no units.
        weight: a number or a schedule. None: 10 for features, 5 for logits.
        across_processes: see :class:`~d2kd.losses.DistillLoss`.

    Raises:
        InputError: if ``source`` or the temperature is invalid. In ``setup``, of logits: if anchors differ, the head has
            no such level, classes differ and their names were not given, or no class is shared.

    Example:
        >>> from d2kd.testing import batch, sum_distill_losses, distiller, forward_losses, tiny_retinanet
        >>> model = distiller(lambda: CWDLoss(source="logits"), tiny_retinanet, same=True)
        >>> sum_distill_losses(forward_losses(model, batch())).item()  # the teacher is a copy
        0.0
    """

    def __init__(
        self,
        *,
        levels: LevelChoice = None,
        source: str = "features",
        temperature: float = 1.0,
        valid_only: bool = False,
        adapter: str = "auto",
        normalize: bool = True,
        weight: Weight | None = None,
        across_processes: bool = True,
    ):
        if source not in SOURCES:
            raise InputError("source", source, " or ".join(SOURCES))
        if not temperature > 0:
            raise InputError("temperature", temperature, "a positive number")
        if weight is None:
            weight = 10.0 if source == "features" else 5.0
        super().__init__(
            levels=levels,
            adapter=adapter,
            normalize=normalize and source == "features",
            weight=weight,
            across_processes=across_processes,
        )
        self.source, self.temperature, self.valid_only = source, temperature, valid_only

    default_levels = FeatureLoss.convolved_levels

    def setup(self, student: nn.Module, teacher: nn.Module) -> None:
        if self.source == "features":
            super().setup(student, teacher)
            return
        check_anchors(student, teacher, self.scale, 'the same anchors, or source="features"')
        names, head = self.level_names, list(student.head_in_features)
        names = head if names is None else names
        if isinstance(names, Mapping) or not names or not set(names) <= set(head):
            raise InputError("levels", names, f"of {', '.join(head)}")
        self.levels = {level: level for level in names}
        check_shared_classes(student, teacher, self.class_map)

    def forward(self, student, teacher) -> Tensor:
        logits = self.source == "logits"
        pairs = (self.logit_pairs if logits else self.map_pairs)(student, teacher)
        cells = dict.fromkeys(pairs)
        if self.valid_only:
            cells = (self.head_cells if logits else self.valid_cells)(student, teacher)
        images = self.num_images(next(iter(pairs.values()))[0])
        return sum(
            self.divergence(self.in_units(s, level), self.in_units(t, level), cells[level]).sum()
            / images
            for level, (s, t) in pairs.items()
        )

    def divergence(self, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return the divergence of each image, ``(N,)``, averaged over channels.

        Args:
            student, teacher: ``(N, C, H, W)``.
            valid: cells that count, ``(N, H, W)`` bool. None: all.
        """
        return channel_divergence(student, teacher, self.temperature, valid).mean(dim=1)

    def logit_pairs(self, student, teacher) -> dict[str, tuple[Tensor, Tensor]]:
        """Return class logits of each level of two ``DenseOutputs``, of shared classes, ``(N, A * K, H, W)``."""
        pairs = {}
        by_level = zip(student.detector.head_in_features, student.pred_logits, teacher.pred_logits)
        for level, *logits in by_level:
            if level not in self.levels:
                continue
            if self.class_map is not None:
                logits = self.class_map.shared_logits(*logits)
            grid = student.features[level].shape[-2:]
            pairs[level] = tuple(
                x.transpose(1, 2)
                .reshape(len(x), x.shape[2], *grid, -1)
                .movedim(-1, 1)
                .flatten(1, 2)
                for x in logits
            )
        return pairs

    def head_cells(self, student, teacher) -> dict[str, Tensor]:
        """Return for each level the cells that the images cover, ``(N, H, W)`` bool."""
        sizes = [student.features[level].shape[-2:] for level in self.levels]
        valid = cells_in_images(teacher.images, sizes)
        return dict(zip(self.levels, valid, strict=True))


@in_float32
def channel_divergence(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, valid: Tensor | None = None
) -> Tensor:
    """Return ``tau^2 KL`` of the distributions over cells, ``(N, C)``, of two maps ``(N, C, H, W)``.

    Args:
        valid: cells that count, ``(N, H, W)`` bool. None: all.
    """
    if valid is not None:
        student, teacher = (x.masked_fill(~valid[:, None], PADDING) for x in (student, teacher))
    return softmax_kl(student.flatten(2), teacher.flatten(2), temperature)
