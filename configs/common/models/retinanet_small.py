"""A RetinaNet for small images and a CPU, the dense counterpart of ``faster_rcnn_small.py``."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

from d2kd.modeling.backbone.resnet import basic_resnet

model = model_zoo.get_config("common/models/retinanet.py").model
_channels = 32

model.backbone.bottom_up = L(basic_resnet)(
    width=32, blocks=[2, 2, 2, 2], norm="BN", out_features=["res3", "res4", "res5"]
)
model.backbone.out_channels = _channels
model.backbone.top_block.in_feature = "p5"  # its channels do not depend on the width
model.backbone.top_block.in_channels = _channels

model.head.input_shape = [ShapeSpec(channels=_channels)] * 5
model.head.conv_dims = [_channels] * 2
model.anchor_generator.sizes = [[x, x * 2**0.5] for x in (12, 24, 48, 96, 192)]
model.anchor_generator.aspect_ratios = [1.0]
model.head.num_anchors = 2
model.num_classes = 8

model.pixel_mean = [127.5, 127.5, 127.5]
model.pixel_std = [58.0, 58.0, 58.0]
