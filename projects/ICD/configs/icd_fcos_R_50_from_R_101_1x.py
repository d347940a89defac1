"""ICD on COCO: FCOS R-50 FPN, 1x, from R-101 FPN. Published AP: 39.4 without and 42.9 with ICD.

The model zoo has no FCOS R-101: ``baselines/fcos_R_101_FPN_3x.py`` trains one.
"""

from d2kd.config import distill, method

model, dataloader, optimizer, lr_multiplier, train = distill(
    "COCO-Detection/fcos_R_50_FPN_1x.py",
    teacher=("baselines/fcos_R_101_FPN_3x.py", "output/fcos_R_101_FPN_3x/model_final.pth"),
    inherit=["backbone.fpn_", "backbone.top_block.", "head."],
    **method("icd"),
)

optimizer.params.weight_decay_norm = None  # the default decay, because the head's norms are trained
train.clip_gradients = dict(enabled=True, clip_type="value", clip_value=1.0)
