"""GFL R-50 FPN on the first 50 classes of COCO: increment 1 of 50+30."""

from .common.coco import coco_increment

model, dataloader, optimizer, lr_multiplier, train = coco_increment("50+30", 1)
