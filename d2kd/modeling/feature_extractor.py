"""A backbone alone, as a teacher of features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.structures import ImageList
from torch import Tensor, nn

from ..utils.errors import InputError


class FeatureExtractor(nn.Module):
    """A backbone alone, as the ``detector`` of a :class:`Teacher` of which losses read features only.

    It predicts nothing, so it has no classes and no AP. The name of a parameter is ``backbone.…``, as in a detector.

    Args:
        backbone: a Detectron2 backbone, such as a :class:`TimmBackbone`.
        pixel_mean, pixel_std: of its images, three values each in the order of ``input_format``. None: the backbone's
            ``pixel_statistics``, which are in RGB.
        input_format: channel order of its images, "RGB" or "BGR".

    Raises:
        InputError: the backbone has no pixel statistics in this order, and none are given.
    """

    def __init__(
        self,
        backbone: nn.Module,
        pixel_mean: Sequence[float] | None = None,
        pixel_std: Sequence[float] | None = None,
        input_format: str = "RGB",
    ):
        super().__init__()
        self.backbone, self.input_format = backbone, input_format
        known = getattr(backbone, "pixel_statistics", None) if input_format == "RGB" else None
        for name, given, own in zip(
            ("pixel_mean", "pixel_std"), (pixel_mean, pixel_std), known or (None, None)
        ):
            if given is None and own is None:
                found = f"none, of a {type(backbone).__name__} of {input_format} images"
                raise InputError(name, found, "three numbers")
            value = torch.tensor(list(own if given is None else given)).view(-1, 1, 1)
            self.register_buffer(name, value, persistent=False)

    @property
    def has_weights(self) -> bool:
        """Whether the backbone was built with weights that are not random."""
        return getattr(self.backbone, "has_weights", False)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Return the normalized batch, padded so that every level has whole cells."""
        images = [
            (x["image"].to(self.device) - self.pixel_mean) / self.pixel_std for x in batched_inputs
        ]
        strides = [shape.stride for shape in self.backbone.output_shape().values()]
        return ImageList.from_tensors(images, self.backbone.size_divisibility or max(strides))

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor]:
        """Return the feature maps ``(N, C, H, W)`` of a batch in Detectron2's format, by level."""
        return self.backbone(self.preprocess_image(batched_inputs).tensor)
