"""A GFL for small images and a CPU, the counterpart of ``retinanet_small.py`` with box edges as distributions."""

from d2kd.modeling import GFL, GFLHead, LinearP6P7

from .retinanet_small import model

for _key in (
    "anchor_generator",
    "box2box_transform",
    "anchor_matcher",
    "focal_loss_alpha",
    "focal_loss_gamma",
):
    model.pop(_key)
model._target_ = GFL
model.anchor_scale = 4  # objects of 8 to 100 pixels
model.backbone.top_block._target_ = LinearP6P7
model.head._target_ = GFLHead
model.head.pop("num_anchors")
model.head.num_groups = 4  # of 8 channels, as 32 groups of 256 channels have
