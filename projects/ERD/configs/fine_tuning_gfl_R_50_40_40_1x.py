"""COCO, 40+40, the last 40 classes learned without the old detector: what ERD is to prevent."""

from .common.coco import coco_step

model, dataloader, optimizer, lr_multiplier, train = coco_step("40+40", 2, method="fine_tuning")
