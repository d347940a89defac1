"""FGD on COCO: FCOS R-50 FPN, 2x, from R-101 FPN, whose neck and head it inherits.

Published AP: 38.5 without and 42.7 with FGD. The model zoo has no FCOS R-101: ``baselines/fcos_R_101_FPN_3x.py`` trains one.
"""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from d2kd.config import distill
from d2kd.losses import DistillLosses, FGDLoss

model, dataloader, optimizer, lr_multiplier, train = distill(
    "COCO-Detection/fcos_R_50_FPN_1x.py",
    teacher=(
        "baselines/fcos_R_101_FPN_3x.py",
        "output/fcos_R_101_FPN_3x/model_final.pth",
    ),
    losses=L(DistillLosses)(
        fgd=L(FGDLoss)(
            levels=["p3", "p4", "p5", "p6", "p7"],
            temperature=0.8,
            foreground_weight=1.6e-3,
            background_weight=8e-4,
            attention_weight=8e-4,
            relation_weight=8e-6,
            published_masks=True,
            normalize=False,
        )
    ),
    inherit=["backbone.fpn_", "backbone.top_block.", "head."],
)

lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_2x
train.max_iter = 180000
train.clip_gradients = dict(enabled=True, clip_type="full_model", clip_value=35.0)
optimizer.params.weight_decay_norm = None  # the default decay, because the head's norms are trained
