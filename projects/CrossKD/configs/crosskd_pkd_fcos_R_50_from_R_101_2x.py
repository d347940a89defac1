"""CrossKD and PKD on COCO: the recipe beside this one, with the features of P3 to P7 compared, too. See README.md."""

from detectron2.config import LazyCall as L

from d2kd.losses import PKDLoss

from .crosskd_fcos_R_50_from_R_101_2x import (  # noqa: F401  (parts of the recipe)
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.losses.pkd = L(PKDLoss)(levels=["p3", "p4", "p5", "p6", "p7"], weight=2.0)
