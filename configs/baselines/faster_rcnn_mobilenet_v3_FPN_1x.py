"""Faster R-CNN MobileNetV3-Large FPN on COCO, 1x schedule as for R-50."""

from ..common.models.faster_rcnn_torchvision import model  # noqa: F401  (part of the recipe)
from .faster_rcnn_R_50_FPN_1x import dataloader, lr_multiplier, optimizer, train  # noqa: F401

dataloader.train.mapper.image_format = "RGB"
train.init_checkpoint = ""  # the backbone loads torchvision's weights itself
