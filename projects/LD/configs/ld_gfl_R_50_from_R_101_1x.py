"""LD on COCO: GFL R-50 FPN, 1x, from R-101 FPN. Published AP: 40.1 without and 42.1 with LD.

``baselines/gfl_R_101_FPN_2x.py`` trains the teacher. The first two terms are sums over the images of a process, of which
there are two: train with 8 GPUs, or scale ``main_weight`` and ``vlr_weight`` by 2 / images per GPU.
"""

from detectron2.config import LazyCall as L

from d2kd.config import distill
from d2kd.losses import DistillLosses, LDLoss

model, dataloader, optimizer, lr_multiplier, train = distill(
    "baselines/gfl_R_50_FPN_1x.py",
    teacher=("baselines/gfl_R_101_FPN_2x.py", "output/gfl_R_101_FPN_2x/model_final.pth"),
    losses=L(DistillLosses)(
        ld=L(LDLoss)(
            main_weight=0.25,
            vlr_weight=0.25,
            class_weight=10.0,
            temperature=10.0,
            class_temperature=2.0,
            vlr="published",
            vlr_weighting="iou",
            normalize_by="none",
            across_processes=False,
        )
    ),
)
