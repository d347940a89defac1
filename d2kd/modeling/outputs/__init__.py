"""Outputs of one detector for one batch, captured or lazily computed.

The student's outputs are captured by forward hooks while it trains, and carry gradient. The teacher's are
computed, without gradient, when a loss first reads them. Both have the same class.

Notation: N images, R regions of the batch, K classes, A anchors of a location, (Hi, Wi) the size of level i.
"""

from .base import (
    DetectorOutputs,
    OutputDict,
    OutputNotAvailable,
    autocast_context,
    current_autocast_dtype,
    lazy_property,
)
from .build import get_outputs_class
from .capture import Call, capture
from .dense import DenseOutputs
from .rcnn import (
    MaskRegions,
    RCNNOutputs,
    Regions,
    append_proposals,
    box_stages,
    has_mask_regions,
    match_and_label_boxes,
    uses_sigmoid_scores,
)

__all__ = [
    "Call",
    "DenseOutputs",
    "DetectorOutputs",
    "MaskRegions",
    "OutputDict",
    "OutputNotAvailable",
    "RCNNOutputs",
    "Regions",
    "append_proposals",
    "autocast_context",
    "box_stages",
    "capture",
    "current_autocast_dtype",
    "get_outputs_class",
    "has_mask_regions",
    "lazy_property",
    "match_and_label_boxes",
    "uses_sigmoid_scores",
]
