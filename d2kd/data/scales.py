"""A student of small images beside a teacher of large ones: one view of a scene, in two sizes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks
from torch import Tensor

from ..errors import InputError


class TwoScales:
    """A mapper's sample made smaller, with the full image kept for the teacher.

    Crop, flip and all else happen once, at full size; the student gets the reduced copy.

    Args:
        mapper: makes a sample of a dataset dict, such as Detectron2's ``DatasetMapper``.
        scale: how many times larger the teacher's images are, an integer; see ``Teacher(scale=…)``.

    Raises:
        InputError: the scale is no integer of at least 2.
    """

    def __init__(self, mapper: Callable[[dict], dict | None], scale: int):
        if scale != int(scale) or scale < 2:
            raise InputError("scale", scale, "an integer of at least 2")
        self.mapper, self.scale = mapper, int(scale)

    def __call__(self, dataset_dict: dict) -> dict | None:
        """The sample with ``image`` and ``instances`` reduced, and ``teacher_image``, the full one.

        ``height`` and ``width`` stay the file's: detections of both sizes are given in its pixels.
        """
        sample = self.mapper(dataset_dict)
        if sample is None:
            return None
        full = sample["image"]
        reduced = {**sample, "image": reduce(full, self.scale), "teacher_image": full}
        if "instances" in sample:
            size = tuple(reduced["image"].shape[-2:])
            reduced["instances"] = reduce_instances(sample["instances"], self.scale, size)
        return reduced


def reduce(image: Tensor, scale: int) -> Tensor:
    """``(C, H, W)`` to ``(C, ceil(H / scale), ceil(W / scale))``, the mean of each square of pixels.

    A side that is no multiple goes on with its last pixels, so that coordinates are divided exactly.
    """
    height, width = image.shape[-2:]
    values = F.pad(image[None].float(), (0, -width % scale, 0, -height % scale), mode="replicate")
    values = F.avg_pool2d(values, scale)[0]
    return values if image.is_floating_point() else values.round().to(image.dtype)


def reduce_instances(instances: Instances, scale: int, image_size: tuple[int, int]) -> Instances:
    """Instances in the coordinates of the reduced image, of ``image_size`` (H, W).

    Raises:
        InputError: masks that are bitmaps, whose reduced edges would be another's choice.
    """
    reduced = Instances(image_size)
    for name, value in instances.get_fields().items():
        if isinstance(value, Boxes):
            value = Boxes(value.tensor / scale)
        elif isinstance(value, PolygonMasks):
            polygons = [[np.asarray(p) / scale for p in one] for one in value.polygons]
            value = PolygonMasks(polygons)
        elif isinstance(value, Keypoints):
            points = copy.deepcopy(value.tensor)
            points[..., :2] /= scale
            value = Keypoints(points)
        elif name == "gt_masks":
            raise InputError("mapper", "masks as bitmaps", "instance_mask_format='polygon'")
        reduced.set(name, value)
    return reduced
