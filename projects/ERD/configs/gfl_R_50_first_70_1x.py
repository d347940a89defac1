"""GFL R-50 FPN on the first 70 classes of COCO: increment 1 of 70+10."""

from .common.coco import coco_increment

model, dataloader, optimizer, lr_multiplier, train = coco_increment("70+10", 1)
