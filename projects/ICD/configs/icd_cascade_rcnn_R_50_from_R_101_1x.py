"""ICD on COCO: Cascade R-CNN R-50 FPN, 1x, from R-101 FPN. There is no published result.

The model zoo has no Cascade R-CNN R-101: ``baselines/cascade_rcnn_R_101_FPN_3x.py`` trains one.
"""

from d2kd.config import distill, method

model, dataloader, optimizer, lr_multiplier, train = distill(
    "baselines/cascade_rcnn_R_50_FPN_1x.py",
    teacher=(
        "baselines/cascade_rcnn_R_101_FPN_3x.py",
        "output/cascade_rcnn_R_101_FPN_3x/model_final.pth",
    ),
    inherit=["backbone.fpn_", "proposal_generator.", "roi_heads."],
    **method("icd"),
)

train.clip_gradients = dict(enabled=True, clip_type="value", clip_value=1.0)
