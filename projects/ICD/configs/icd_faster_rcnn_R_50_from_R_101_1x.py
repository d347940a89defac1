"""ICD on COCO: Faster R-CNN R-50 FPN, 1x, from the zoo's R-101 FPN. Published AP: 37.9 without and 40.9 with ICD."""

from d2kd.config import distill, method

model, dataloader, optimizer, lr_multiplier, train = distill(
    "baselines/faster_rcnn_R_50_FPN_1x.py",
    teacher=(
        "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml",
        "detectron2://COCO-Detection/faster_rcnn_R_101_FPN_3x/137851257/model_final_f6e8b1.pkl",
    ),
    inherit=["backbone.fpn_", "proposal_generator.", "roi_heads."],
    **method("icd"),
)

train.clip_gradients = dict(enabled=True, clip_type="value", clip_value=1.0)
