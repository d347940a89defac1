"""COCO, 40+40, with all old logits kept everywhere: Learning without Forgetting, our port."""

from detectron2.config import LazyCall as L

from d2kd.losses import DistillLosses, LwFLoss

from .common.coco import coco_step

model, dataloader, optimizer, lr_multiplier, train = coco_step(
    "40+40", 2, L(DistillLosses)(lwf=L(LwFLoss)()), method="lwf"
)
