"""Cascade R-CNN R-50 FPN on COCO, 1x schedule: ``faster_rcnn_R_50_FPN_1x.py`` with three box stages."""

from ..common.models.cascade_rcnn_fpn import model
from .faster_rcnn_R_50_FPN_1x import dataloader, lr_multiplier, optimizer, train  # noqa: F401

model.backbone.bottom_up.freeze_at = 2
