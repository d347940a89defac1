"""CWD on COCO, on class logits: GFL R-50 FPN, 1x, from R-101 FPN. Published AP: 40.2 without and 41.9 with CWD.

The model zoo has no GFL: ``baselines/gfl_R_101_FPN_2x.py`` trains the teacher.
"""

from detectron2.config import LazyCall as L

from d2kd.config import distill
from d2kd.losses import CWDLoss, DistillLosses

model, dataloader, optimizer, lr_multiplier, train = distill(
    "baselines/gfl_R_50_FPN_1x.py",
    teacher=("baselines/gfl_R_101_FPN_2x.py", "output/gfl_R_101_FPN_2x/model_final.pth"),
    losses=L(DistillLosses)(cwd=L(CWDLoss)(source="logits", temperature=1.0, weight=5.0)),
)
