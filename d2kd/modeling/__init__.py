"""Teacher, student and the distiller that joins them. This package knows no loss."""

from .distiller import Distiller, add_distiller_config
from .outputs import DenseOutputs, DetectorOutputs, RCNNOutputs, Regions, capture, outputs_of
from .teacher import Teacher

__all__ = [
    "DenseOutputs",
    "DetectorOutputs",
    "Distiller",
    "RCNNOutputs",
    "Regions",
    "Teacher",
    "add_distiller_config",
    "capture",
    "outputs_of",
]
