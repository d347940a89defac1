"""A small RetinaNet on the generated shapes.

The schedule is that of ``faster_rcnn_small_shapes.py``, but longer and with twice the learning rate.
"""

from ..common.models.retinanet_small import model
from .faster_rcnn_small_shapes import dataloader, lr_multiplier, optimizer, train  # noqa: F401

model.backbone.bottom_up.width = 8
model.backbone.bottom_up.blocks = [1, 1, 1, 1]

optimizer.lr = 4e-3
train.max_iter, train.eval_period = 2000, 1000
