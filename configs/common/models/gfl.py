"""GFL R-50 FPN as published. It needs ``dataloader.train.mapper.image_format="RGB"``.

Its weights are torchvision's, ``detectron2://ImageNetPretrained/torchvision/R-50.pkl``, with the stride in the 3x3
convolution. FrozenBN also freezes scale and offset, unlike the authors; ``baselines/gfl_R_50_FPN_1x_affine.py`` does not.
"""

from detectron2 import model_zoo

from d2kd.modeling import GFL, GFLHead, LinearP6P7
from d2kd.modeling.backbone.torchvision_backbone import (
    TORCHVISION_PIXEL_MEAN,
    TORCHVISION_PIXEL_STD,
)

model = model_zoo.get_config("common/models/retinanet.py").model
for _key in (
    "anchor_generator",
    "box2box_transform",
    "anchor_matcher",
    "focal_loss_alpha",
    "focal_loss_gamma",
):
    model.pop(_key)
model._target_ = GFL
model.backbone.bottom_up.stages.stride_in_1x1 = False
model.backbone.bottom_up.freeze_at = 2
model.backbone.top_block._target_ = LinearP6P7
model.backbone.top_block.in_feature = "p5"
model.backbone.top_block.in_channels = 256
model.head._target_ = GFLHead
model.head.pop("num_anchors")

model.input_format = "RGB"
model.pixel_mean = TORCHVISION_PIXEL_MEAN
model.pixel_std = TORCHVISION_PIXEL_STD
