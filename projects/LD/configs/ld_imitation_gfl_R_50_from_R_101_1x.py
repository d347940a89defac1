"""LD and imitation on COCO: the recipe beside this one, with the features inside objects compared, too.

Published AP with imitation: 42.4. The authors choose other cells; the mask and the weight here are those of FGFI's code.
"""

from detectron2.config import LazyCall as L

from d2kd.losses import ImitationLoss

from .ld_gfl_R_50_from_R_101_1x import (  # noqa: F401  (parts of the recipe)
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.losses.imitation = L(ImitationLoss)(mask="box", normalize=False, weight=0.01)
