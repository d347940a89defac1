"""Faster R-CNN FPN with a torchvision classifier as backbone. It needs ``dataloader.train.mapper.image_format="RGB"``.

Recipes change ``model.backbone.bottom_up.name`` (``efficientnet_b0``, ``resnet18``, …) and ``.weights``.
"""

from detectron2.config import LazyCall as L

from d2kd.modeling.backbone.torchvision_backbone import (
    TORCHVISION_PIXEL_MEAN,
    TORCHVISION_PIXEL_STD,
    TorchvisionBackbone,
)

from .faster_rcnn_fpn import model

model.backbone.bottom_up = L(TorchvisionBackbone)(
    name="mobilenet_v3_large",
    weights="DEFAULT",
    norm="FrozenBN",  # as in torchvision's detectors; "BN" if weights is None
    out_features=["res2", "res3", "res4", "res5"],
)

model.input_format = "RGB"
model.pixel_mean = TORCHVISION_PIXEL_MEAN
model.pixel_std = TORCHVISION_PIXEL_STD
