"""ICD on COCO: Mask R-CNN R-50 FPN, 1x, from the zoo's R-101 FPN.

Published: box AP 38.6 without and 41.2 with ICD, mask AP 35.2 and 37.4.
"""

from d2kd.config import distill, method

model, dataloader, optimizer, lr_multiplier, train = distill(
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py",
    teacher=(
        "COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x.yaml",
        "detectron2://COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x/138205316/"
        "model_final_a3ec72.pkl",
    ),
    inherit=["backbone.fpn_", "proposal_generator.", "roi_heads."],
    **method("icd"),
)

train.clip_gradients = dict(enabled=True, clip_type="value", clip_value=1.0)
