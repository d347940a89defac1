"""MGD on COCO: Faster R-CNN R-50 FPN, 2x, from the zoo's Faster R-CNN X101 FPN.

Published AP: 38.4 without and 42.1 with MGD, from a Cascade Mask R-CNN X101-DCN (47.3), which the model zoo does not have.
"""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from d2kd.config import distill
from d2kd.losses import DistillLosses, MGDLoss

model, dataloader, optimizer, lr_multiplier, train = distill(
    "baselines/faster_rcnn_R_50_FPN_1x.py",
    teacher=(
        "COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml",
        "detectron2://COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x/139173657/"
        "model_final_68b088.pkl",
    ),
    losses=L(DistillLosses)(
        mgd=L(MGDLoss)(
            levels=["p2", "p3", "p4", "p5"],
            mask_ratio=0.45,
            reduction="sum",
            normalize=False,
            seed="${train.seed}",
            weight=5e-7,
        )
    ),
)

lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_2x
train.max_iter = 180000
train.clip_gradients = dict(enabled=True, clip_type="full_model", clip_value=35.0)
