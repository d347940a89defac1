"""A thin Faster R-CNN on blood cells, alone. Cells are 20 to 100 pixels long here, which its anchors cover."""

from ..common.data.bccd import dataloader  # noqa: F401  (part of the recipe)
from .faster_rcnn_small_shapes import lr_multiplier, model, optimizer, train  # noqa: F401

model.roi_heads.num_classes = 3

train.best_checkpoint = "bbox/AP"  # few images: the last state need not be the best
