"""Learning without Forgetting, as ported to detection by d2kd, on COCO, 40+40: old logits distilled at all anchors."""

from detectron2.config import LazyCall as L

from d2kd.losses import DistillLosses, LwFLoss

from .common.coco import coco_increment

model, dataloader, optimizer, lr_multiplier, train = coco_increment(
    "40+40", 2, L(DistillLosses)(lwf=L(LwFLoss)()), method="lwf"
)
