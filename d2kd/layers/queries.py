"""Instance queries: descriptors of real objects and sampled negatives, without their exact boxes.

Notation: N images, K query slots per image, C classes. Lengths without a unit are fractions of the width and height of
the image.
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

_CENTER = 128  # channels per coordinate
_BINS = 5  # bins of the logarithm of width and of height


def descriptor_size(num_classes: int) -> int:
    """Return the length of a descriptor, C + 266."""
    return num_classes + 2 * _CENTER + 2 * _BINS


def make_descriptors(classes: Tensor, centers: Tensor, sides: Tensor, num_classes: int) -> Tensor:
    """Return descriptors of class, position and quantized size.

    Args:
        classes: ``(...)`` in ``[0, C)``.
        centers: ``(..., 2)``, x and y in [0, 1].
        sides: ``(..., 2)``, width and height in pixels of the resized image.

    Returns:
        Tensor: ``(..., C + 266)``: one-hot class; 64 sines and 64 cosines of x, then of y; one-hot width and height
        in five bins, of which the first ends at 64 pixels and the last starts at 518.
    """
    period = 10000 ** (torch.arange(0, _CENTER, 2, device=centers.device) / _CENTER)
    angle = 2 * math.pi * centers[..., None] / period
    position = torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2)
    # 1.44 as published, not 1 / ln 2: the bin edges are 64.5, 129.2, 258.7 and 518.0.
    bins = (1.44 * sides.clamp(min=1e-6).log() - 5).clamp(0, _BINS - 1).long()
    one_hot = F.one_hot(classes, num_classes), F.one_hot(bins, _BINS).flatten(-2)
    return torch.cat([one_hot[0].to(position), position, one_hot[1].to(position)], dim=-1)


@dataclass
class InstanceQueries:
    """The queries of a batch. Images with fewer than K have empty slots at the end, where all values are 0.

    Attributes:
        descriptors: ``(N, K, C + 266)``, see :func:`make_descriptors`.
        centers: ``(N, K, 2)``, x and y of the jittered centre.
        edge_distances: ``(N, K, 4)``, from the jittered centre to the left, top, right and bottom of the box.
        is_positive: ``(N, K)`` bool, slots with a real object, not a negative.
        is_used: ``(N, K)`` bool, slots that are not empty.
    """

    descriptors: Tensor
    centers: Tensor
    edge_distances: Tensor
    is_positive: Tensor
    is_used: Tensor

    def to(self, device: torch.device) -> InstanceQueries:
        return InstanceQueries(
            *(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self))
        )


def num_queries(objects: int, negatives_per_instance: float, max_queries: int) -> int:
    """Return the number of queries of an image: at least one, and at least its objects."""
    wanted = max(1, math.floor(objects * (1 + negatives_per_instance)))
    return min(wanted, max(max_queries, objects))


def make_queries(
    gt_instances: Sequence[Instances],
    priors: InstancePriors,
    *,
    negatives_per_instance: float = 5.0,
    max_queries: int = 300,
    jitter: float = 0.3,
    generator: torch.Generator | None = None,
) -> InstanceQueries:
    """Create queries of each image's objects, followed by sampled negatives.

    Args:
        gt_instances: ``gt_boxes`` in pixels of ``image_size``, and ``gt_classes``.
        priors: distribution of the negatives, see :func:`sample_negatives`.
        negatives_per_instance: number of negatives per object.
        max_queries: maximum number of queries of an image, unless it has more objects.
        jitter: maximum offset of a query's centre, in box widths and heights, for objects and negatives.
        generator: random generator of the negatives and the jitter.

    Returns:
        InstanceQueries: on the CPU.

    Raises:
        InputError: if the class of an object is not one of the priors' classes.
    """
    num_classes = priors.num_classes
    counts = [len(gt) for gt in gt_instances]
    # One copy from the device for all images, since each copy synchronizes.
    all_boxes = Boxes.cat([gt.gt_boxes for gt in gt_instances]).tensor.detach().float().cpu()
    all_classes = torch.cat([gt.gt_classes for gt in gt_instances]).cpu()
    images = []
    for gt, gt_boxes, gt_classes in zip(
        gt_instances, all_boxes.split(counts), all_classes.split(counts), strict=True
    ):
        height, width = gt.image_size
        size = torch.tensor([width, height], dtype=torch.float32)
        count = num_queries(len(gt), negatives_per_instance, max_queries)
        boxes, classes = sample_negatives(priors, count, generator)
        real = torch.arange(count) < len(gt)
        boxes[real] = gt_boxes / size.repeat(2)
        classes[real] = gt_classes
        for k in classes[(classes < 0) | (classes >= num_classes)].tolist():
            raise InputError("gt_classes", k, f"classes from 0 to {num_classes - 1}")
        low, high = boxes.split(2, dim=1)
        sides = high - low
        offset = (2 * torch.rand(count, 2, generator=generator) - 1) * jitter
        centers = (low + high) / 2 + offset * sides
        descriptors = make_descriptors(classes, centers, sides * size, num_classes)
        distances = torch.cat([centers - low, high - centers], dim=1)
        images.append((descriptors, centers, distances, real, torch.ones_like(real)))
    return InstanceQueries(*(pad_sequence(list(x), batch_first=True) for x in zip(*images)))


def sample_negatives(
    priors: InstancePriors, count: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Sample boxes ``(count, 4)``, XYXY in [0, 1], and their classes ``(count,)``.

    Classes follow the priors' frequencies. Sizes are within two standard deviations of the mean and in [0.002, 0.7],
    centres in [0.03, 0.97]. Boxes are clipped to the image.
    """
    classes = torch.multinomial(priors.frequency, count, replacement=True, generator=generator)
    deviations = torch.randn(count, 2, generator=generator).clamp(-2, 2)
    sides = (priors.mean[classes] + deviations * priors.std[classes]).clamp(0.002, 0.7)
    centers = torch.rand(count, 2, generator=generator).clamp(0.03, 0.97)
    boxes = torch.cat([centers - sides / 2, centers + sides / 2], dim=1).clamp(0, 1)
    return boxes, classes
