"""A Mask R-CNN for small images and a CPU: ``faster_rcnn_small.py`` with a mask head."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import MaskRCNNConvUpsampleHead

from .faster_rcnn_small import model

model.roi_heads.mask_in_features = model.roi_heads.box_in_features
model.roi_heads.mask_pooler = L(ROIPooler)(
    output_size=14,
    scales=model.roi_heads.box_pooler.scales,
    sampling_ratio=1,
    pooler_type="ROIAlignV2",
)
model.roi_heads.mask_head = L(MaskRCNNConvUpsampleHead)(
    input_shape=ShapeSpec(channels=model.backbone.out_channels, width=14, height=14),
    num_classes="${..num_classes}",
    conv_dims=[model.backbone.out_channels] * 3,
)
