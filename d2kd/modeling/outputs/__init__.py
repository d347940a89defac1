"""What one detector said about one batch.

The student's outputs are filled with what was captured while it trained, so they carry its graph; the
teacher's compute themselves, without gradient, when a loss first reads them. One class serves both:
*what was captured carries gradient; what is asked is constant.*

Letters: N images, R regions of the batch, K classes, A anchors of a location, (Hi, Wi) the grid of level i.
"""

from .base import DetectorOutputs, Maps, Unreadable, asked, precision_around, precision_of
from .build import outputs_of
from .capture import Call, capture
from .dense import DenseOutputs, by_anchor
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
    "by_anchor",
    "capture",
    "match_labels",
    "more_proposals",
    "outputs_of",
    "precision_around",
    "precision_of",
    "scores_by_sigmoid",
]
