"""Faster R-CNN ResNet-18, trained from scratch on BCCD, with the FPN and heads of ``faster_rcnn_small.py``.

Also try ``model.backbone.bottom_up.name`` (``resnet50``, ``mobilenet_v3_small``, …).
"""

from ..common.data.bccd import dataloader  # noqa: F401  (part of the recipe)
from .faster_rcnn_mobilenet_v3_shapes import lr_multiplier, model, optimizer, train  # noqa: F401

model.backbone.bottom_up.name = "resnet18"
model.roi_heads.num_classes = 3

train.best_checkpoint = "bbox/AP"  # with few images, the last checkpoint may not be the best
