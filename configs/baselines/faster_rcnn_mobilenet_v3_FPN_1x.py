"""Faster R-CNN MobileNetV3-Large FPN on COCO, at the schedule of R-50's 1x."""

from ..common.models.faster_rcnn_torchvision import model  # noqa: F401  (part of the recipe)
from .faster_rcnn_R_50_FPN_1x import dataloader, lr_multiplier, optimizer, train  # noqa: F401

dataloader.train.mapper.image_format = "RGB"
train.init_checkpoint = ""  # the backbone brings torchvision's weights
