"""GFL R-50 FPN on the first 40 classes of COCO: increment 1 of 40+40, 40+20+20 and 40+10x4."""

from .common.coco import coco_increment

model, dataloader, optimizer, lr_multiplier, train = coco_increment("40+40", 1)
