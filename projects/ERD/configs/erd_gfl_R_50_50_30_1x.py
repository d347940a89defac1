"""ERD on COCO, 50+30: the last 30 classes after the first 50."""

from detectron2.config import LazyCall as L

from d2kd.losses import DistillLosses, ERDLoss

from .common.coco import coco_increment

model, dataloader, optimizer, lr_multiplier, train = coco_increment(
    "50+30", 2, L(DistillLosses)(erd=L(ERDLoss)())
)
