"""Inputs for a student on downscaled images and a teacher on the full ones."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from numbers import Real

import numpy as np
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks
from torch import Tensor

from ..utils.errors import InputError


class DownscaledStudentMapper:
    """A dataset mapper that downscales the output of another mapper, and keeps the full image for the teacher.

    Augmentations are applied once, at full size, so both images show the same view.

    Args:
        mapper: a dataset mapper, such as Detectron2's ``DatasetMapper``.
        scale: factor by which the teacher's images are larger, any number above 1; see ``Teacher(scale=…)``.

    Raises:
        InputError: if the scale is not a number above 1.
    """

    def __init__(self, mapper: Callable[[dict], dict | None], scale: float):
        if not isinstance(scale, Real) or not 1 < scale < math.inf:
            raise InputError("scale", scale, "any number above 1")
        self.mapper = mapper
        self.scale = int(scale) if scale == int(scale) else float(scale)

    def __call__(self, dataset_dict: dict) -> dict | None:
        """Return the sample with ``image``, ``instances`` and ``proposals`` downscaled, and the full ``teacher_image``.

        ``height`` and ``width`` are still those of the file, to which detections are rescaled.
        """
        sample = self.mapper(dataset_dict)
        if sample is None:
            return None
        full = sample["image"]
        small = {**sample, "image": downscale(full, self.scale), "teacher_image": full}
        for key in {"instances", "proposals"} & sample.keys():
            size = tuple(small["image"].shape[-2:])
            small[key] = downscale_instances(sample[key], tuple(full.shape[-2:]), size)
        return small


def downscale(image: Tensor, scale: float) -> Tensor:
    """Downscale an image.

    An integer scale takes means of scale x scale pixels: (C, H, W) to (C, ceil(H / scale), ceil(W / scale)). Any other
    rounds H / scale and W / scale to the nearest size and interpolates bilinearly with antialiasing, both as
    ``ResizeShortestEdge`` does: means over whole pixels would lie beside the centres of the new ones.

    If a side is not a multiple of ``scale``, its own factor differs slightly. Coordinates are multiplied by
    new side / old side, as in Detectron2's postprocessing.
    """
    if scale == int(scale):
        size = [math.ceil(side / scale) for side in image.shape[-2:]]
        values = F.interpolate(image[None].float(), size, mode="area")[0]
    else:
        size = [max(1, int(side / scale + 0.5)) for side in image.shape[-2:]]
        values = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]
    return values if image.is_floating_point() else values.round().to(image.dtype)


def downscale_instances(
    instances: Instances, full_size: tuple[int, int], image_size: tuple[int, int]
) -> Instances:
    """Rescale instances from an image of ``full_size`` (H, W) to one of ``image_size``.

    Raises:
        InputError: if masks are bitmaps, for which the resampling method would matter.
    """
    y, x = (new / old for new, old in zip(image_size, full_size))
    small = Instances(image_size)
    for name, value in instances.get_fields().items():
        if isinstance(value, Boxes):
            value = value.clone()
            value.scale(x, y)
        elif isinstance(value, PolygonMasks):
            polygons = [
                [(np.reshape(p, (-1, 2)) * (x, y)).ravel() for p in one] for one in value.polygons
            ]
            value = PolygonMasks(polygons)
        elif isinstance(value, Keypoints):
            points = copy.deepcopy(value.tensor)
            points[..., :2] *= points.new_tensor([x, y])
            value = Keypoints(points)
        elif name == "gt_masks":
            raise InputError("mapper", "masks as bitmaps", "instance_mask_format='polygon'")
        small.set(name, value)
    return small
