"""Untrained detectors and random batches for measurements without weights or data.

Batch norms are given the statistics of these batches, since the activations of an untrained network diverge with the
initial ones. Frozen batch norms stay frozen, as in training.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from fvcore.nn.precise_bn import update_bn_stats
from torch import nn

from ..modeling.inference_optimization import is_frozen_norm
from ..structures.class_map import num_classes_of

OBJECTS = 7


@torch.no_grad()
def measure_norm_statistics(detector: nn.Module, batches: Sequence[list[dict]]) -> None:
    """Set the statistics of all batch norms to those of these batches in training mode; frozen ones stay frozen."""
    frozen = {n: m for n, m in detector.named_modules() if is_frozen_norm(m)}
    measured = {}
    for name, norm in frozen.items():
        bn = nn.BatchNorm2d(norm.num_features, norm.eps).to(norm.weight.device)
        bn.load_state_dict(norm.state_dict(), strict=False)
        measured[name] = bn
        # timm's norms have an activation.
        detector.set_submodule(name, nn.Sequential(bn, norm.act) if hasattr(norm, "act") else bn)
    training = detector.training
    detector.train()
    with EventStorage():
        update_bn_stats(detector, batches, len(batches))
    detector.train(training)
    for name, norm in frozen.items():
        norm.running_mean.copy_(measured[name].running_mean)
        norm.running_var.copy_(measured[name].running_var)
        detector.set_submodule(name, norm)


def random_batch(
    detector: nn.Module, image_size: tuple[int, int], batch_size: int, seed: int
) -> list[dict]:
    """Return a training batch in Detectron2's format: noise images of (height, width) with seven objects each.

    The sides of the objects are from 1/16 to 2/3 of the image. Their classes are spread over all that the detector
    learns. For a mask head they have rectangular masks.
    """
    height, width = image_size
    random = np.random.default_rng(seed)
    batch = []
    for _ in range(batch_size):
        side = np.geomspace(1 / 16, 2 / 3, OBJECTS)
        stretch = np.exp(random.uniform(-0.3, 0.3, OBJECTS))
        extent = np.stack([side * stretch, side / stretch], axis=1)
        corner = random.uniform(size=(OBJECTS, 2)) * (1 - extent)
        boxes = np.concatenate([corner, corner + extent], axis=1) * [width, height, width, height]
        instances = Instances(image_size)
        instances.gt_boxes = Boxes(torch.from_numpy(boxes).float())
        first = getattr(detector, "num_old_classes", 0)
        classes = np.linspace(first, num_classes_of(detector) - 1, OBJECTS)
        classes = classes.round().astype(np.int64)
        instances.gt_classes = torch.from_numpy(random.permutation(classes))
        if getattr(getattr(detector, "roi_heads", None), "mask_on", False):
            corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]]
            instances.gt_masks = PolygonMasks([[polygon] for polygon in corners])
        image = random.integers(256, size=(3, height, width), dtype=np.uint8)
        sides = {"height": height, "width": width}
        batch.append({"image": torch.from_numpy(image), "instances": instances, **sides})
    return batch
