"""Feature pyramids that Detectron2 does not build by a name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN
from detectron2.modeling.backbone import build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import Tensor

from .torchvision_backbone import STAGES, TorchvisionBackbone


class LinearP6P7(LastLevelP6P7):
    """Levels p6 and p7 from the pyramid's own p5; RetinaNet's come from res5, with a ReLU before p7.

    Args:
        in_channels: of p5, those of the pyramid.
        out_channels: of p6 and p7, the same.
        in_feature: the level to start from.
    """

    def __init__(self, in_channels: int, out_channels: int, in_feature: str = "p5"):
        super().__init__(in_channels, out_channels, in_feature)

    def forward(self, p5: Tensor) -> list[Tensor]:
        p6 = self.p6(p5)
        return [p6, self.p7(p6)]


@BACKBONE_REGISTRY.register()
def build_gfl_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Detectron2's ResNet and an FPN on ``MODEL.FPN.IN_FEATURES``, by default res3 to res5; p6 and p7 made of p5."""
    in_features = cfg.MODEL.FPN.IN_FEATURES or ["res3", "res4", "res5"]
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.RESNETS.OUT_FEATURES = list(in_features)  # Detectron2's default is res4 alone
    return FPN(
        bottom_up=build_resnet_backbone(cfg, input_shape),
        in_features=in_features,
        out_channels=channels,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LinearP6P7(channels, channels),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


@BACKBONE_REGISTRY.register()
def build_torchvision_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """``MODEL.TORCHVISION`` and an FPN on ``MODEL.FPN.IN_FEATURES``, by default p2 to p6."""
    in_features = cfg.MODEL.FPN.IN_FEATURES or list(STAGES.values())
    return _fpn(cfg, in_features, lambda bottom_up: LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_torchvision_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """``MODEL.TORCHVISION`` and an FPN on ``MODEL.FPN.IN_FEATURES``, by default p3 to p7."""
    in_features = cfg.MODEL.FPN.IN_FEATURES or list(STAGES.values())[1:]
    last = in_features[-1]
    return _fpn(
        cfg,
        in_features,
        lambda bottom_up: LastLevelP6P7(
            bottom_up.output_shape()[last].channels, cfg.MODEL.FPN.OUT_CHANNELS, in_feature=last
        ),
    )


def _fpn(cfg: CfgNode, in_features: Sequence[str], top_block: Callable) -> FPN:
    node = cfg.MODEL.TORCHVISION
    bottom_up = TorchvisionBackbone(
        node.NAME,
        weights=node.WEIGHTS,
        norm=node.NORM,
        norm_momentum=node.NORM_MOMENTUM,
        out_features=in_features,
    )
    return FPN(
        bottom_up=bottom_up,
        in_features=in_features,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block(bottom_up),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
