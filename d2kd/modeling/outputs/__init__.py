"""Outputs of one detector for one batch, captured or lazily computed.

The student's outputs are captured by forward hooks while it trains, and carry gradient. The teacher's are
computed, without gradient, when a loss first reads them. Both have the same class.

Notation: N images, R regions of the batch, K classes, A anchors of a location, (Hi, Wi) the size of level i.
"""

from .base import DetectorOutputs, Maps, Unreadable, asked, precision_around, precision_of
from .build import outputs_of
from .capture import Call, capture
from .dense import DenseOutputs
from .rcnn import RCNNOutputs, Regions, box_stages, match_labels, more_proposals, scores_by_sigmoid

__all__ = [
    "Call",
    "DenseOutputs",
    "DetectorOutputs",
    "Maps",
    "RCNNOutputs",
    "Regions",
    "Unreadable",
    "asked",
    "box_stages",
    "capture",
    "match_labels",
    "more_proposals",
    "outputs_of",
    "precision_around",
    "precision_of",
    "scores_by_sigmoid",
]
