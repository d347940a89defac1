"""A Cascade R-CNN for small images and a CPU: ``faster_rcnn_small.py`` with three box stages."""

from detectron2.config import LazyCall as L
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNOutputLayers

from .faster_rcnn_small import model

_heads = model.roi_heads
_head, _predictor = _heads.pop("box_head"), _heads.pop("box_predictor")
_heads.pop("proposal_matcher")
_heads._target_ = CascadeROIHeads
_heads.box_heads = [_head] * 3
_heads.box_predictors = [
    L(FastRCNNOutputLayers)(
        input_shape=_predictor.input_shape,
        test_score_thresh=_predictor.test_score_thresh,
        box2box_transform=L(Box2BoxTransform)(weights=(a, a, b, b)),
        cls_agnostic_bbox_reg=True,
        num_classes="${...num_classes}",
    )
    for a, b in [(10, 5), (20, 10), (30, 15)]
]
_heads.proposal_matchers = [
    L(Matcher)(thresholds=[iou], labels=[0, 1], allow_low_quality_matches=False)
    for iou in [0.5, 0.6, 0.7]
]
