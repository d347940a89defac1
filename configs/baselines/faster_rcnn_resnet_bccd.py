"""Faster R-CNN ResNet-18, from random weights, on blood cells, with the narrow pyramid and heads of the thin one.

What else a recipe may try: ``model.backbone.bottom_up.name`` (``resnet50``, ``mobilenet_v3_small``, …).
"""

from ..common.data.bccd import dataloader  # noqa: F401  (part of the recipe)
from .faster_rcnn_mobilenet_v3_shapes import (  # noqa: F401
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.backbone.bottom_up.name = "resnet18"
model.roi_heads.num_classes = 3

train.best_checkpoint = "bbox/AP"  # few images: the last state need not be the best
