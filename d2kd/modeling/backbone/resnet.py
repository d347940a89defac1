"""ResNets of basic blocks, and batch norm with fixed statistics."""

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
        blocks: number of blocks of each of the four stages, at strides 4, 8, 16 and 32.
        norm: a norm by its name in Detectron2.
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
    """Batch norm with the running statistics that were loaded, and trainable scale and offset.

    It lies between Detectron2's "BN" and "FrozenBN"; MMDetection has it as ``norm_eval``. In a config, write
    ``norm=L(locate)(name="d2kd.modeling.StaticBatchNorm2d")`` with ``locate`` from ``detectron2.utils.registry``.
    """

    def train(self, mode: bool = True) -> StaticBatchNorm2d:
        return super().train(False)
