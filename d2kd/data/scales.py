"""A student of small images beside a teacher of large ones: one view of a scene, in two sizes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks
from torch import Tensor

from ..utils.errors import InputError


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
        """The sample with ``image``, ``instances`` and ``proposals`` reduced, and ``teacher_image``, the full one.

        ``height`` and ``width`` stay the file's: detections of both sizes are given in its pixels.
        """
        sample = self.mapper(dataset_dict)
        if sample is None:
            return None
        full = sample["image"]
        reduced = {**sample, "image": reduce(full, self.scale), "teacher_image": full}
        for key in {"instances", "proposals"} & sample.keys():
            size = tuple(reduced["image"].shape[-2:])
            reduced[key] = reduce_instances(sample[key], tuple(full.shape[-2:]), size)
        return reduced


def reduce(image: Tensor, scale: int) -> Tensor:
    """``(C, H, W)`` to ``(C, ceil(H / scale), ceil(W / scale))``, each pixel the mean of those it covers.

    The whole image becomes the whole image: where a side is no multiple, its factor is a little less than ``scale``,
    and coordinates are multiplied by new side / old side, as Detectron2 does when it brings detections back.
    """
    size = [math.ceil(side / scale) for side in image.shape[-2:]]
    values = F.interpolate(image[None].float(), size, mode="area")[0]
    return values if image.is_floating_point() else values.round().to(image.dtype)


def reduce_instances(
    instances: Instances, full_size: tuple[int, int], image_size: tuple[int, int]
) -> Instances:
    """Instances of an image of ``full_size`` (H, W) in the coordinates of the reduced one, of ``image_size``.

    Raises:
        InputError: masks that are bitmaps, whose reduced edges would be another's choice.
    """
    y, x = (new / old for new, old in zip(image_size, full_size))
    reduced = Instances(image_size)
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
        reduced.set(name, value)
    return reduced
