"""Student, teacher and the Distiller that trains one beside the other. Losses are in :mod:`d2kd.losses`."""

from .backbone.fpn import LinearP6P7
from .backbone.resnet import StaticBatchNorm2d, basic_resnet
from .backbone.timm_backbone import TimmBackbone, add_timm_config, timm_pixel_statistics
from .backbone.torchvision_backbone import TorchvisionBackbone, add_torchvision_config
from .feature_extractor import FeatureExtractor
from .meta_arch import GFL, Distiller, GFLHead, add_distiller_config, add_gfl_config
from .outputs import (
    DenseOutputs,
    DetectorOutputs,
    MaskRegions,
    RCNNOutputs,
    Regions,
    capture,
    get_outputs_class,
)
from .teacher import Teacher

__all__ = [
    "GFL",
    "DenseOutputs",
    "DetectorOutputs",
    "Distiller",
    "FeatureExtractor",
    "GFLHead",
    "LinearP6P7",
    "MaskRegions",
    "RCNNOutputs",
    "Regions",
    "StaticBatchNorm2d",
    "Teacher",
    "TimmBackbone",
    "TorchvisionBackbone",
    "add_distiller_config",
    "add_gfl_config",
    "add_timm_config",
    "add_torchvision_config",
    "basic_resnet",
    "capture",
    "get_outputs_class",
    "timm_pixel_statistics",
]
