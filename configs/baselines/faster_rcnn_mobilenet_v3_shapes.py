"""Faster R-CNN MobileNetV3-Small, trained from scratch on the generated shapes.

Also try ``model.backbone.bottom_up.name`` (``efficientnet_b0``, ``resnet18``, …).
"""

from detectron2.config import LazyCall as L

from d2kd.modeling.backbone.torchvision_backbone import TorchvisionBackbone

from .faster_rcnn_small_shapes import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.backbone.bottom_up = L(TorchvisionBackbone)(
    name="mobilenet_v3_small",
    weights=None,
    norm="BN",
    norm_momentum=0.1,  # torchvision's 0.01 is too slow for a few hundred iterations
    out_features=["res2", "res3", "res4", "res5"],
)
