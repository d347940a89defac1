"""ERD on COCO, 60+20: the last 20 classes after the first 60."""

from detectron2.config import LazyCall as L

from d2kd.losses import DistillLosses, ERDLoss

from .common.coco import coco_increment

model, dataloader, optimizer, lr_multiplier, train = coco_increment(
    "60+20", 2, L(DistillLosses)(erd=L(ERDLoss)())
)
