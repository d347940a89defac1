"""Feature pyramids that are not in Detectron2's ``BACKBONE_REGISTRY``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone import build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import Tensor, nn

from .timm_backbone import TimmBackbone
from .torchvision_backbone import STAGES, TorchvisionBackbone


class LinearP6P7(LastLevelP6P7):
    """Levels p6 and p7 computed from the pyramid's p5. RetinaNet's are computed from res5, with a ReLU before p7.

    Args:
        in_channels: channels of p5, which are those of the pyramid.
        out_channels: channels of p6 and p7; the same number.
        in_feature: name of the input level.
    """

    def __init__(self, in_channels: int, out_channels: int, in_feature: str = "p5"):
        super().__init__(in_channels, out_channels, in_feature)

    def forward(self, p5: Tensor) -> list[Tensor]:
        p6 = self.p6(p5)
        return [p6, self.p7(p6)]


@BACKBONE_REGISTRY.register()
def build_gfl_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Detectron2's ResNet and an FPN on ``MODEL.FPN.IN_FEATURES``, by default res3 to res5, and LinearP6P7."""
    in_features = cfg.MODEL.FPN.IN_FEATURES or ["res3", "res4", "res5"]
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.RESNETS.OUT_FEATURES = list(in_features)  # Detectron2's default is res4 alone
    bottom_up = build_resnet_backbone(cfg, input_shape)
    return _fpn(cfg, bottom_up, in_features, LinearP6P7(channels, channels))


@BACKBONE_REGISTRY.register()
def build_torchvision_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A :class:`TorchvisionBackbone` and an FPN on ``MODEL.FPN.IN_FEATURES``, by default with levels p2 to p6."""
    return _rcnn_fpn(cfg, _torchvision)


@BACKBONE_REGISTRY.register()
def build_retinanet_torchvision_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A :class:`TorchvisionBackbone` and an FPN on ``MODEL.FPN.IN_FEATURES``, by default with levels p3 to p7."""
    return _retinanet_fpn(cfg, _torchvision)


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A :class:`TimmBackbone` and an FPN on ``MODEL.FPN.IN_FEATURES``, by default with levels p2 to p6."""
    return _rcnn_fpn(cfg, _timm)


@BACKBONE_REGISTRY.register()
def build_retinanet_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A :class:`TimmBackbone` and an FPN on ``MODEL.FPN.IN_FEATURES``, by default with levels p3 to p7."""
    return _retinanet_fpn(cfg, _timm)


def _torchvision(cfg: CfgNode, out_features: Sequence[str]) -> TorchvisionBackbone:
    node = cfg.MODEL.TORCHVISION
    return TorchvisionBackbone(
        node.NAME,
        weights=node.WEIGHTS,
        norm=node.NORM,
        norm_momentum=node.NORM_MOMENTUM,
        out_features=out_features,
    )


def _timm(cfg: CfgNode, out_features: Sequence[str]) -> TimmBackbone:
    node = cfg.MODEL.TIMM
    return TimmBackbone(
        node.NAME,
        pretrained=node.PRETRAINED,
        checkpoint_path=node.CHECKPOINT_PATH,
        out_features=out_features,
        norm=node.NORM,
        norm_momentum=node.NORM_MOMENTUM,
        freeze_at=node.FREEZE_AT,
    )


def _rcnn_fpn(cfg: CfgNode, build: Callable[[CfgNode, Sequence[str]], Backbone]) -> FPN:
    in_features = cfg.MODEL.FPN.IN_FEATURES or list(STAGES.values())
    return _fpn(cfg, build(cfg, in_features), in_features, LastLevelMaxPool())


def _retinanet_fpn(cfg: CfgNode, build: Callable[[CfgNode, Sequence[str]], Backbone]) -> FPN:
    in_features = cfg.MODEL.FPN.IN_FEATURES or list(STAGES.values())[1:]
    bottom_up, last = build(cfg, in_features), in_features[-1]
    channels = bottom_up.output_shape()[last].channels
    top_block = LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS, in_feature=last)
    return _fpn(cfg, bottom_up, in_features, top_block)


def _fpn(
    cfg: CfgNode, bottom_up: Backbone, in_features: Sequence[str], top_block: nn.Module
) -> FPN:
    return FPN(
        bottom_up=bottom_up,
        in_features=in_features,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
