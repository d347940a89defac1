"""PKD on COCO: RetinaNet R-50 FPN, 2x, from the zoo's R-101 FPN.

Published AP: 37.4 without and 40.8 with PKD, from a RetinaNet X101 (41.0), which the model zoo does not have.
"""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from d2kd.config import distill
from d2kd.losses import DistillLosses, PKDLoss

model, dataloader, optimizer, lr_multiplier, train = distill(
    "COCO-Detection/retinanet_R_50_FPN_1x.py",
    teacher=(
        "COCO-Detection/retinanet_R_101_FPN_3x.yaml",
        "detectron2://COCO-Detection/retinanet_R_101_FPN_3x/190397697/model_final_971ab9.pkl",
    ),
    losses=L(DistillLosses)(pkd=L(PKDLoss)(levels=["p3", "p4", "p5", "p6"], weight=10.0)),
)

lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_2x
train.max_iter = 180000
