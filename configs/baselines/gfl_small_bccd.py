"""A small GFL on BCCD: the schedule of ``faster_rcnn_small_bccd.py``, the best of three learning rates on val."""

from ..common.models.gfl_small import model
from .faster_rcnn_small_bccd import dataloader, lr_multiplier, optimizer, train  # noqa: F401

model.backbone.bottom_up.width = 8
model.backbone.bottom_up.blocks = [1, 1, 1, 1]
model.num_classes = 3

optimizer.lr = 8e-3
