"""Bottom-up networks and feature pyramids that Detectron2 lacks."""

from .fpn import LinearP6P7
from .resnet import StaticBatchNorm2d, basic_resnet
from .timm_backbone import TimmBackbone, add_timm_config, timm_pixel_statistics
from .torchvision_backbone import (
    TORCHVISION_PIXEL_MEAN,
    TORCHVISION_PIXEL_STD,
    TorchvisionBackbone,
    add_torchvision_config,
)

__all__ = [
    "TORCHVISION_PIXEL_MEAN",
    "TORCHVISION_PIXEL_STD",
    "LinearP6P7",
    "StaticBatchNorm2d",
    "TimmBackbone",
    "TorchvisionBackbone",
    "add_timm_config",
    "add_torchvision_config",
    "basic_resnet",
    "timm_pixel_statistics",
]
