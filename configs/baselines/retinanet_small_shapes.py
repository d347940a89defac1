"""A thin RetinaNet on the generated shapes, alone.

The schedule is that of ``faster_rcnn_small_shapes.py``, of which a dense detector wants more: some thousands of steps.
"""

from ..common.models.retinanet_small import model
from .faster_rcnn_small_shapes import (  # noqa: F401  (parts of the recipe)
    dataloader,
    lr_multiplier,
    optimizer,
    train,
)

model.backbone.bottom_up.width = 8
model.backbone.bottom_up.blocks = [1, 1, 1, 1]

optimizer.lr = 4e-3
