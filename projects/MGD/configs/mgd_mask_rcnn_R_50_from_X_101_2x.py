"""MGD on COCO: Mask R-CNN R-50 FPN, 2x, from the zoo's Mask R-CNN X101 FPN.

Published mask AP: 35.4 without and 38.1 with MGD, from a Cascade Mask R-CNN X101-DCN, which the model zoo does not have.
"""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from d2kd.config import distill
from d2kd.losses import DistillLosses, MGDLoss

model, dataloader, optimizer, lr_multiplier, train = distill(
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py",
    teacher=(
        "COCO-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN_3x.yaml",
        "detectron2://COCO-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN_3x/139653917/"
        "model_final_2d9806.pkl",
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
