"""ERD on COCO, 40+10x4, increment 2: from the student of increment 1."""

from detectron2.config import LazyCall as L

from d2kd.losses import DistillLosses, ERDLoss

from .common.coco import coco_increment

model, dataloader, optimizer, lr_multiplier, train = coco_increment(
    "40+10x4", 2, L(DistillLosses)(erd=L(ERDLoss)())
)
