"""ResNets of basic blocks, and batch norms without statistics of their own."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock
from torch import nn


def basic_resnet(
    width: int = 64,
    blocks: Sequence[int] = (2, 2, 2, 2),
    norm: str = "BN",
    out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
) -> ResNet:
    """A ResNet of basic blocks of any width; 64 and (2, 2, 2, 2) give ResNet-18.

    Args:
        width: channels of the stem and of the first stage; each stage doubles them.
        blocks: blocks of each of the four stages, at strides 4, 8, 16 and 32.
        norm: Detectron2's name of a norm.
        out_features: the stages to return.
    """
    stages, channels = [], width
    for k, count in enumerate(blocks):
        stages.append(
            ResNet.make_stage(
                BasicBlock,
                count,
                stride_per_block=[1 if k == 0 else 2] + [1] * (count - 1),
                in_channels=channels,
                out_channels=width * 2**k,
                norm=norm,
            )
        )
        channels = width * 2**k
    stem = BasicStem(in_channels=3, out_channels=width, norm=norm)
    return ResNet(stem, stages, out_features=list(out_features))


class StaticBatchNorm2d(nn.BatchNorm2d):
    """A batch norm whose statistics stay as they were loaded, and whose scale and offset learn.

    Between Detectron2's "BN" and "FrozenBN"; MMDetection's detectors train so (``norm_eval``). As a node's ``norm``:
    ``L(locate)(name="d2kd.modeling.StaticBatchNorm2d")``, ``locate`` of ``detectron2.utils.registry``.
    """

    def train(self, mode: bool = True) -> StaticBatchNorm2d:
        return super().train(False)
