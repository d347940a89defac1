"""A small RetinaNet on BCCD, with the schedule of ``faster_rcnn_small_bccd.py``."""

from ..common.models.retinanet_small import model
from .faster_rcnn_small_bccd import dataloader, lr_multiplier, optimizer, train  # noqa: F401

model.backbone.bottom_up.width = 8
model.backbone.bottom_up.blocks = [1, 1, 1, 1]
model.num_classes = 3
