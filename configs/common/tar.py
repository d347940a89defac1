"""TAR for COCO's schedules: ``losses``. Features are compared as published, without normalisation.

model, dataloader, optimizer, lr_multiplier, train = distill(…, losses=get_config("common/tar.py").losses)
"""

from detectron2.config import LazyCall as L

from d2kd.losses import DistillLosses, TARLoss

losses = L(DistillLosses)(
    tar=L(TARLoss)(
        normalize=False, feature_weight=0.01, classification_weight=1.0, regression_weight=1.0
    )
)
