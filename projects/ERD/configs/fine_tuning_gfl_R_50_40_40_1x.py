"""Fine-tuning on the last 40 classes of COCO, 40+40, without a teacher: the baseline of ERD."""

from .common.coco import coco_increment

model, dataloader, optimizer, lr_multiplier, train = coco_increment(
    "40+40", 2, method="fine_tuning"
)
