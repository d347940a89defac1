"""DIST on COCO: Faster R-CNN R-50 FPN, 2x, from the zoo's Cascade Mask R-CNN R-50, whose first stage is compared.

The published teacher is a Cascade Mask R-CNN X101 with 45.6 AP. The zoo's R-50 has 44.3.
"""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from d2kd.config import distill
from d2kd.losses import DistillLosses, DISTLoss

model, dataloader, optimizer, lr_multiplier, train = distill(
    "baselines/faster_rcnn_R_50_FPN_1x.py",
    teacher=(
        "Misc/cascade_mask_rcnn_R_50_FPN_3x.yaml",
        "detectron2://Misc/cascade_mask_rcnn_R_50_FPN_3x/144998488/model_final_480dd8.pkl",
    ),
    losses=L(DistillLosses)(dist=L(DISTLoss)(inter_weight=1.0, intra_weight=1.0, floor=0)),
)

lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_2x
train.max_iter = 180000
