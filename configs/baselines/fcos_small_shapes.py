"""A small FCOS on the generated shapes, with the schedule and learning rate of ``retinanet_small_shapes.py``."""

from ..common.models.fcos_small import model
from .retinanet_small_shapes import dataloader, lr_multiplier, optimizer, train  # noqa: F401

model.backbone.bottom_up.width = 8
model.backbone.bottom_up.blocks = [1, 1, 1, 1]
