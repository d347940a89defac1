"""PKD on COCO: RetinaNet R-50 FPN, 1x, from FCOS R-101 FPN.

Published AP: 36.5 without and 40.3 with PKD, from an FCOS X101 (42.6). The model zoo has neither FCOS:
``baselines/fcos_R_101_FPN_3x.py`` trains the one with R-101.
"""

from detectron2.config import LazyCall as L

from d2kd.config import distill
from d2kd.losses import DistillLosses, PKDLoss

model, dataloader, optimizer, lr_multiplier, train = distill(
    "COCO-Detection/retinanet_R_50_FPN_1x.py",
    teacher=("baselines/fcos_R_101_FPN_3x.py", "output/fcos_R_101_FPN_3x/model_final.pth"),
    losses=L(DistillLosses)(pkd=L(PKDLoss)(levels=["p3", "p4", "p5", "p6"], weight=10.0)),
)
