"""ERD on COCO, 40+10x4, increment 4: from the student of increment 3."""

from detectron2.config import LazyCall as L

from d2kd.losses import DistillLosses, ERDLoss

from .common.coco import coco_increment

model, dataloader, optimizer, lr_multiplier, train = coco_increment(
    "40+10x4", 4, L(DistillLosses)(erd=L(ERDLoss)())
)
