"""GFL R-50 FPN on the first 60 classes of COCO: increment 1 of 60+20."""

from .common.coco import coco_increment

model, dataloader, optimizer, lr_multiplier, train = coco_increment("60+20", 1)
