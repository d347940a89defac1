"""FGD on COCO: GFL R-50 FPN, 1x, from R-101 FPN, whose neck and head it inherits.

Published AP: 40.2 without and 43.5 with FGD. The model zoo has no GFL: ``baselines/gfl_R_101_FPN_2x.py`` trains the teacher.
"""

from detectron2.config import LazyCall as L

from d2kd.config import distill
from d2kd.losses import DistillLosses, FGDLoss

model, dataloader, optimizer, lr_multiplier, train = distill(
    "baselines/gfl_R_50_FPN_1x.py",
    teacher=(
        "baselines/gfl_R_101_FPN_2x.py",
        "output/gfl_R_101_FPN_2x/model_final.pth",
    ),
    losses=L(DistillLosses)(
        fgd=L(FGDLoss)(
            levels=["p3", "p4", "p5", "p6", "p7"],
            temperature=0.5,
            foreground_weight=1e-3,
            background_weight=5e-4,
            attention_weight=5e-4,
            relation_weight=5e-6,
            published_masks=True,
            normalize=False,
        )
    ),
    inherit=["backbone.fpn_", "backbone.top_block.", "head."],
)

train.clip_gradients = dict(enabled=True, clip_type="full_model", clip_value=35.0)
