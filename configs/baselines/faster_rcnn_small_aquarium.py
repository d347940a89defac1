"""A small Faster R-CNN on Aquarium, without a teacher. 90 % of the objects are 6 to 70 pixels long, many twice as wide as high."""

from ..common.data.aquarium import dataloader  # noqa: F401  (part of the recipe)
from .faster_rcnn_small_shapes import lr_multiplier, model, optimizer, train  # noqa: F401

model.roi_heads.num_classes = 7

model.proposal_generator.head.num_anchors = 3
model.proposal_generator.anchor_generator.aspect_ratios = [0.5, 1.0, 2.0]
model.proposal_generator.anchor_generator.sizes = [[6], [12], [24], [48], [96]]
model.proposal_generator.pre_nms_topk = (1000, 500)  # an image has up to 55 objects
model.proposal_generator.post_nms_topk = (300, 200)

train.best_checkpoint = "bbox/AP"  # with few images, the last checkpoint may not be the best
