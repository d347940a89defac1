"""A small Faster R-CNN on BCCD, without a teacher. Cells are 20 to 100 pixels long, within the range of its anchors."""

from ..common.data.bccd import dataloader  # noqa: F401  (part of the recipe)
from .faster_rcnn_small_shapes import lr_multiplier, model, optimizer, train  # noqa: F401

model.roi_heads.num_classes = 3

train.best_checkpoint = "bbox/AP"  # with few images, the last checkpoint may not be the best
