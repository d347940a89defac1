"""GFL R-50 FPN on COCO, 1x schedule. Norms train scale and offset, with fixed statistics, as published."""

from detectron2.config import LazyCall as L
from detectron2.utils.registry import locate

from .gfl_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

for _part in (model.backbone.bottom_up.stem, model.backbone.bottom_up.stages):
    _part.norm = L(locate)(name="d2kd.modeling.StaticBatchNorm2d")
