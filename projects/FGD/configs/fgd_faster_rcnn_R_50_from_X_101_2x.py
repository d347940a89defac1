"""FGD on COCO: Faster R-CNN R-50 FPN, 2x, from the zoo's Faster R-CNN X101 FPN.

Published AP: 38.4 without and 42.0 with FGD, from a Cascade Mask R-CNN X101-DCN (47.3), which the model zoo does not have.
As there, nothing is inherited.
"""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from d2kd.config import distill
from d2kd.losses import DistillLosses, FGDLoss

model, dataloader, optimizer, lr_multiplier, train = distill(
    "baselines/faster_rcnn_R_50_FPN_1x.py",
    teacher=(
        "COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml",
        "detectron2://COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x/139173657/"
        "model_final_68b088.pkl",
    ),
    losses=L(DistillLosses)(
        fgd=L(FGDLoss)(
            levels=["p2", "p3", "p4", "p5"],
            temperature=0.5,
            foreground_weight=5e-5,
            background_weight=2.5e-5,
            attention_weight=5e-5,
            relation_weight=5e-7,
            published_masks=True,
            normalize=False,
        )
    ),
)

lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_2x
train.max_iter = 180000
train.clip_gradients = dict(enabled=True, clip_type="full_model", clip_value=35.0)
