"""A small GFL on the generated shapes.

The schedule is that of ``faster_rcnn_small_shapes.py``, but longer. The learning rate is the best of 1e-3, 2e-3, 4e-3
and 8e-3 on ``shapes_val`` after 2000 iterations, with a seed that no study uses.
"""

from ..common.models.gfl_small import model
from .faster_rcnn_small_shapes import dataloader, lr_multiplier, optimizer, train  # noqa: F401

model.backbone.bottom_up.width = 8
model.backbone.bottom_up.blocks = [1, 1, 1, 1]

optimizer.lr = 8e-3
train.max_iter, train.eval_period = 1400, 700
