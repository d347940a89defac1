"""An FCOS for small images and a CPU, the anchor-free counterpart of ``retinanet_small.py``."""

from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead

from .retinanet_small import model

for _key in ("anchor_generator", "box2box_transform", "anchor_matcher", "input_format"):
    model.pop(_key)
model._target_ = FCOS
model.test_score_thresh, model.test_nms_thresh = 0.05, 0.6
model.head._target_ = FCOSHead
model.head.pop("num_anchors")
