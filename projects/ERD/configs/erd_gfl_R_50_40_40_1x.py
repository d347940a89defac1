"""ERD on COCO, 40+40: the last 40 classes after the first 40."""

from detectron2.config import LazyCall as L

from d2kd.losses import DistillLosses, ERDLoss

from .common.coco import coco_increment

model, dataloader, optimizer, lr_multiplier, train = coco_increment(
    "40+40", 2, L(DistillLosses)(erd=L(ERDLoss)())
)
