"""Teacher, student and the distiller that joins them. This package knows no loss."""

from .backbone import TorchvisionBackbone, add_torchvision_config, basic_resnet
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
    "TorchvisionBackbone",
    "add_distiller_config",
    "add_torchvision_config",
    "basic_resnet",
    "capture",
    "outputs_of",
]
