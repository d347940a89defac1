"""PKD on COCO: Faster R-CNN R-50 FPN, 2x, from the zoo's R-101 FPN. Published AP: 38.4 without and 40.4 with PKD."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from d2kd.config import distill
from d2kd.losses import DistillLosses, PKDLoss

model, dataloader, optimizer, lr_multiplier, train = distill(
    "baselines/faster_rcnn_R_50_FPN_1x.py",
    teacher=(
        "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml",
        "detectron2://COCO-Detection/faster_rcnn_R_101_FPN_3x/137851257/model_final_f6e8b1.pkl",
    ),
    losses=L(DistillLosses)(pkd=L(PKDLoss)(levels=["p2", "p3", "p4", "p5"], weight=6.0)),
)

lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_2x
train.max_iter = 180000
