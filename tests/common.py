"""Small detectors and batches that every test may use; seeded, on the CPU, in milliseconds."""

from __future__ import annotations

import torch
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances
from torch import nn

from d2kd.config import get_config

CLASSES = 3


def tiny_faster_rcnn(width: int = 4, channels: int = 16, classes: int = CLASSES):
    """The LazyConfig node of a Faster R-CNN with frozen norms, the same in train and in eval."""
    model = get_config("common/models/faster_rcnn_small.py").model
    _shrink(model, width, channels)
    model.proposal_generator.head.in_channels = channels
    model.proposal_generator.batch_size_per_image = 32
    model.proposal_generator.pre_nms_topk = (60, 30)
    model.proposal_generator.post_nms_topk = (20, 10)
    model.roi_heads.num_classes = classes
    model.roi_heads.batch_size_per_image = 16
    model.roi_heads.box_head.input_shape = ShapeSpec(channels=channels, height=7, width=7)
    model.roi_heads.box_head.fc_dims = [32]
    model.roi_heads.box_predictor.input_shape = ShapeSpec(channels=32)
    return model


def tiny_retinanet(width: int = 4, channels: int = 16, classes: int = CLASSES):
    """The LazyConfig node of a RetinaNet."""
    model = get_config("common/models/retinanet_small.py").model
    _shrink(model, width, channels)
    model.backbone.top_block.in_channels = channels
    model.head.input_shape = [ShapeSpec(channels=channels)] * 5
    model.head.conv_dims = [channels]
    model.num_classes = classes
    return model


def _shrink(model, width: int, channels: int) -> None:
    model.backbone.bottom_up.width = width
    model.backbone.bottom_up.blocks = [1, 1, 1, 1]
    model.backbone.bottom_up.norm = "FrozenBN"
    model.backbone.out_channels = channels


DETECTORS = {"faster_rcnn": tiny_faster_rcnn, "retinanet": tiny_retinanet}


def build(node, seed: int = 0) -> nn.Module:
    """An instantiated node with the weights of a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return instantiate(node)


def batch(
    sizes=((64, 64), (48, 72)), objects=(2, 1), classes: int = CLASSES, seed: int = 0
) -> list[dict]:
    """Detectron2's training batch: random images with ``objects[i]`` random boxes each."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for (height, width), count in zip(sizes, objects, strict=True):
        corner = torch.rand(count, 2, generator=generator) * 0.5
        extent = 0.2 + torch.rand(count, 2, generator=generator) * 0.3
        scale = torch.tensor([width, height, width, height])
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.cat([corner, corner + extent], dim=1) * scale)
        instances.gt_classes = torch.randint(classes, (count,), generator=generator)
        image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        examples.append({"image": image, "instances": instances, "height": height, "width": width})
    return examples
