"""ReviewKD and DKD on COCO: the recipe beside this one, with the classes of regions compared, too.

AP as remembered from the paper of DKD, not confirmed: 37.9 without and 40.7 with both.
"""

from detectron2.config import LazyCall as L

from d2kd.losses import DKDLoss

from .reviewkd_faster_rcnn_R_50_from_R_101_2x import (  # noqa: F401  (parts of the recipe)
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.losses.dkd = L(DKDLoss)(target_weight=1.0, non_target_weight=0.25, temperature=1.0)
