"""Faster R-CNN ResNet-18, from random weights, on blood cells, with the narrow pyramid and heads of the thin one.

What else a recipe may try: ``model.backbone.bottom_up.name`` (``resnet50``, ``mobilenet_v3_small``, …).
"""

from detectron2.config import LazyCall as L

from d2kd.modeling.backbone import TorchvisionBackbone

from .faster_rcnn_small_bccd import (  # noqa: F401  (parts of the recipe)
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.backbone.bottom_up = L(TorchvisionBackbone)(
    name="resnet18",
    weights=None,
    norm="BN",
    norm_momentum=0.1,
    out_features=["res2", "res3", "res4", "res5"],
)
