"""BCKD on COCO: GFL R-50 FPN, 1x, from R-101 FPN. Published AP: 40.1 without and 43.2 with BCKD.

``baselines/gfl_R_101_FPN_2x.py`` trains the teacher.
"""

from detectron2.config import LazyCall as L

from d2kd.config import distill
from d2kd.losses import BCKDLoss, DistillLosses

model, dataloader, optimizer, lr_multiplier, train = distill(
    "baselines/gfl_R_50_FPN_1x.py",
    teacher=("baselines/gfl_R_101_FPN_2x.py", "output/gfl_R_101_FPN_2x/model_final.pth"),
    losses=L(DistillLosses)(
        bckd=L(BCKDLoss)(
            class_weight=1.0, box_weight=4.0, levels="with_objects", across_processes=True
        )
    ),
)
