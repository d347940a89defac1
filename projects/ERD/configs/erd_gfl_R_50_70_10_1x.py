"""ERD on COCO, 70+10: the last 10 classes after the first 70."""

from detectron2.config import LazyCall as L

from d2kd.losses import DistillLosses, ERDLoss

from .common.coco import coco_increment

model, dataloader, optimizer, lr_multiplier, train = coco_increment(
    "70+10", 2, L(DistillLosses)(erd=L(ERDLoss)())
)
