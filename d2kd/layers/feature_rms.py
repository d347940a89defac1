"""The scale of a teacher's features, for losses between raw feature maps."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from detectron2.structures import ImageList
from detectron2.utils import comm
from torch import Tensor, nn

from ..utils.errors import InputError
from .masks import cells_in_images

logger = logging.getLogger(__name__)

MAX_FACTOR = 5.0
"""Largest usual factor between the RMS of one batch and that of many images."""


def sums_of_squares(images: ImageList, maps: Sequence[Tensor]) -> Tensor:
    """Return the sum of squares and the count of each map's values in the cells of the images: (2, L) float64.

    Args:
        images: a padded batch.
        maps: of L levels, ``(N, C, H, W)`` each.
    """
    masks = cells_in_images(images, [x.shape[-2:] for x in maps])
    squares = [
        x.float().square().sum(dim=1).masked_fill(~mask, 0).double().sum()
        for x, mask in zip(maps, masks)
    ]
    counts = [mask.sum().double() * x.shape[1] for x, mask in zip(maps, masks)]
    return torch.stack([torch.stack(squares), torch.stack(counts)])


class FeatureRMS(nn.Module):
    """The root mean square of a teacher's features, one buffer for each level.

    The scale of features differs by orders of magnitude between detectors, and so does a squared difference of raw maps.
    Divided by the RMS, both maps are in units of the teacher, and one loss weight suits many teachers.

    :meth:`Distiller.measure_features` measures it before the first step. Otherwise the first batch is used, with a
    warning. It is part of the checkpoint, so a resumed run keeps it.

    Args:
        levels: names of the teacher's levels.
    """

    def __init__(self, levels: Iterable[str]):
        super().__init__()
        self.levels = list(dict.fromkeys(levels))
        for level in self.levels:
            self.register_buffer(f"rms_{level}", torch.zeros(()))
        self._measured = self._unchecked = False
        self.register_load_state_dict_post_hook(_after_load)

    def forward(self, level: str) -> Tensor:
        """Return the RMS of a level, a scalar."""
        return self.get_buffer(f"rms_{level}")

    @torch.no_grad()
    def sums(self, teacher) -> Tensor:
        """Return the sum of squares and the count of each level's values in a batch, without padding: (2, L) float64.

        Args:
            teacher: outputs of the teacher. Its ``features`` and ``images`` are read.
        """
        return sums_of_squares(teacher.images, [teacher.features[level] for level in self.levels])

    def set_from(self, sums: Tensor) -> None:
        """Set the RMS of each level from the total of :meth:`sums` over batches.

        Raises:
            InputError: the teacher's features are not finite.
        """
        for level, value in zip(self.levels, (sums[0] / sums[1]).sqrt().tolist(), strict=True):
            if not value < float("inf"):
                found = f"features of {level} with an RMS of {value}"
                raise InputError("the teacher", found, "finite features")
            if value == 0:
                logger.warning("the teacher's features of %s are 0", level)
            self.get_buffer(f"rms_{level}").fill_(value or 1.0)
        self._measured = True
        found = ", ".join(f"{level} {self(level).item():.3g}" for level in self.levels)
        logger.info("RMS of the teacher's features: %s", found)

    def measure_once(self, teacher) -> None:
        """Measure the RMS on this batch of all processes; if it was loaded, only warn where it does not fit the batch."""
        if self._measured and not self._unchecked:
            return
        sums = self.sums(teacher)
        if comm.get_world_size() > 1:
            dist.all_reduce(sums)
        if not self._measured:
            logger.warning("The teacher's features are measured on the first training batch alone")
            self.set_from(sums)
        self._unchecked = False
        for level, value in zip(self.levels, (sums[0] / sums[1]).sqrt().tolist(), strict=True):
            loaded = self(level).item()
            if not loaded / MAX_FACTOR <= (value or 1.0) <= loaded * MAX_FACTOR:
                logger.warning(
                    "RMS of the teacher's features of %s: %.3g in the checkpoint, %.3g in this batch: "
                    "is the checkpoint another teacher's?",
                    level,
                    loaded,
                    value,
                )


def _after_load(module: FeatureRMS, incompatible: object) -> None:
    module._measured = all(module(level).item() > 0 for level in module.levels)
    module._unchecked = module._measured
