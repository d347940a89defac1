"""A small Mask R-CNN on the generated shapes, whose outlines are the masks; else as ``faster_rcnn_small_shapes.py``."""

from ..common.models.mask_rcnn_small import model
from .faster_rcnn_small_shapes import dataloader, lr_multiplier, optimizer, train  # noqa: F401

model.backbone.bottom_up.width = 8
model.backbone.bottom_up.blocks = [1, 1, 1, 1]

dataloader.train.mapper.use_instance_mask = True
