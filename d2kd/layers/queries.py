"""Questions about instances: what a decoder is told of real objects and of fakes, without their exact boxes.

Letters: N images, K slots of an image, C classes. Lengths without a unit are parts of the image's own width
and height.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..structures.instance_priors import InstancePriors
from ..utils.errors import InputError

_CENTER = 128  # numbers for each coordinate
_BINS = 5  # of the logarithm of a side


def descriptor_size(num_classes: int) -> int:
    """How long a descriptor is: C + 266."""
    return num_classes + 2 * _CENTER + 2 * _BINS


def describe(classes: Tensor, centers: Tensor, sides: Tensor, num_classes: int) -> Tensor:
    """Class, place and rough size.

    Args:
        classes: ``(...)`` in ``[0, C)``.
        centers: ``(..., 2)``, x and y in 0..1.
        sides: ``(..., 2)``, width and height in pixels of the resized image.

    Returns:
        ``(..., C + 266)``: the class one-hot; 64 sines and 64 cosines of x, then of y; width and height
        one-hot in five bins, of which the first ends at 64 pixels and the last begins at 518.
    """
    period = 10000 ** (torch.arange(0, _CENTER, 2, device=centers.device) / _CENTER)
    angle = 2 * math.pi * centers[..., None] / period
    place = torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2)
    # 1.44 and not 1 / ln 2, as published: the edges lie at 64.5, 129.2, 258.7 and 518.0.
    bins = (1.44 * sides.clamp(min=1e-6).log() - 5).clamp(0, _BINS - 1).long()
    size = F.one_hot(bins, _BINS).flatten(-2)
    return torch.cat([F.one_hot(classes, num_classes).to(place), place, size.to(place)], dim=-1)


@dataclass
class InstanceQueries:
    """The questions of a batch; images with fewer than K have empty slots at the end.

    Attributes:
        descriptors: ``(N, K, C + 266)``, see :func:`describe`; 0 in empty slots.
        centers: ``(N, K, 2)``, x and y of the told centre; 0 in empty slots.
        edge_distances: ``(N, K, 4)``, from the told centre to the left, top, right and bottom of the box.
        is_real: ``(N, K)`` bool, whether the slot holds an object; fakes and empty slots do not.
        is_used: ``(N, K)`` bool.
    """

    descriptors: Tensor
    centers: Tensor
    edge_distances: Tensor
    is_real: Tensor
    is_used: Tensor

    def to(self, device: torch.device) -> InstanceQueries:
        return InstanceQueries(
            *(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self))
        )


def query_count(objects: int, fakes_per_object: float, max_queries: int) -> int:
    """How many questions an image with so many objects gets: at least one, and all its objects."""
    wanted = max(1, math.floor(objects * (1 + fakes_per_object)))
    return min(wanted, max(max_queries, objects))


def make_queries(
    gt_instances: Sequence[Instances],
    priors: InstancePriors,
    *,
    fakes_per_object: float = 5.0,
    max_queries: int = 300,
    jitter: float = 0.3,
    generator: torch.Generator | None = None,
) -> InstanceQueries:
    """Questions about each image's objects, first, and about fakes.

    The told centre is off by up to ``jitter`` of the box's width and height, of real objects and of fakes.

    Args:
        gt_instances: ``gt_boxes`` in pixels of ``image_size``, ``gt_classes``.
        priors: of which fakes are drawn: a class, sides within two standard deviations and 0.002..0.7, a
            centre in 0.03..0.97; what lies outside the image is cut off.
        generator: of all draws.

    Returns:
        on the CPU.

    Raises:
        InputError: an object's class is none of the priors' classes.
    """
    num_classes = priors.num_classes
    counts = [len(gt) for gt in gt_instances]
    # Read from the device together: each copy waits until all that was asked of it is done.
    all_boxes = Boxes.cat([gt.gt_boxes for gt in gt_instances]).tensor.detach().float().cpu()
    all_classes = torch.cat([gt.gt_classes for gt in gt_instances]).cpu()
    images = []
    for gt, gt_boxes, gt_classes in zip(
        gt_instances, all_boxes.split(counts), all_classes.split(counts), strict=True
    ):
        height, width = gt.image_size
        size = torch.tensor([width, height], dtype=torch.float32)
        count = query_count(len(gt), fakes_per_object, max_queries)
        boxes, classes = sample_fakes(priors, count, generator)
        real = torch.arange(count) < len(gt)
        boxes[real] = gt_boxes / size.repeat(2)
        classes[real] = gt_classes
        for k in classes[(classes < 0) | (classes >= num_classes)].tolist():
            raise InputError("gt_classes", k, f"classes from 0 to {num_classes - 1}")
        low, high = boxes.split(2, dim=1)
        sides = high - low
        offset = (2 * torch.rand(count, 2, generator=generator) - 1) * jitter
        centers = (low + high) / 2 + offset * sides
        descriptors = describe(classes, centers, sides * size, num_classes)
        distances = torch.cat([centers - low, high - centers], dim=1)
        images.append((descriptors, centers, distances, real, torch.ones_like(real)))
    return InstanceQueries(*(pad_sequence(list(x), batch_first=True) for x in zip(*images)))


def sample_fakes(
    priors: InstancePriors, count: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Boxes ``(count, 4)`` XYXY in 0..1 that might be objects, and their classes ``(count,)``."""
    classes = torch.multinomial(priors.frequency, count, replacement=True, generator=generator)
    spread = torch.randn(count, 2, generator=generator).clamp(-2, 2)
    sides = (priors.mean[classes] + spread * priors.std[classes]).clamp(0.002, 0.7)
    centers = torch.rand(count, 2, generator=generator).clamp(0.03, 0.97)
    boxes = torch.cat([centers - sides / 2, centers + sides / 2], dim=1).clamp(0, 1)
    return boxes, classes
