"""A Faster R-CNN for small images and a CPU: basic blocks, an FPN of 32 channels, square anchors from 8 pixels.

Recipes change ``model.backbone.bottom_up.width`` and ``.blocks``, and ``model.roi_heads.num_classes``.
"""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

from d2kd.modeling.backbone.resnet import basic_resnet

from .faster_rcnn_fpn import model

_channels, _fc = 32, 256

model.backbone.bottom_up = L(basic_resnet)(
    width=32,
    blocks=[2, 2, 2, 2],
    norm="BN",  # FrozenBN needs pretrained statistics
    out_features=["res2", "res3", "res4", "res5"],
)
model.backbone.out_channels = _channels

model.proposal_generator.head.in_channels = _channels
model.proposal_generator.head.num_anchors = 1
model.proposal_generator.anchor_generator.aspect_ratios = [1.0]
model.proposal_generator.anchor_generator.sizes = [[8], [16], [32], [64], [128]]
model.proposal_generator.batch_size_per_image = 128
model.proposal_generator.pre_nms_topk = (500, 300)
model.proposal_generator.post_nms_topk = (200, 100)

model.roi_heads.num_classes = 8
model.roi_heads.batch_size_per_image = 64
model.roi_heads.box_pooler.sampling_ratio = 1  # bins of small regions are smaller than a cell
model.roi_heads.box_head.input_shape = ShapeSpec(channels=_channels, height=7, width=7)
model.roi_heads.box_head.fc_dims = [_fc]
model.roi_heads.box_predictor.input_shape = ShapeSpec(channels=_fc)

model.pixel_mean = [127.5, 127.5, 127.5]
model.pixel_std = [58.0, 58.0, 58.0]
