"""Optimizations of a detector's computation that change its outputs only by rounding."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.fusion import fuse_conv_bn_weights


@torch.no_grad()
def fuse_norms(detector: nn.Module) -> int:
    """Fold the batch norms of a detector in ``eval()`` into the convolutions before them.

    A norm with fixed statistics is a scale and an offset per channel, which are merged into the convolution's
    weight and bias. This saves one pass over each feature map. Folded are the ``norm`` of a Detectron2 ``Conv2d``,
    and a norm after a convolution in an ``nn.Sequential``, as in torchvision's classifiers. Parameter names
    change, so weights must be loaded and inherited before.

    Returns:
        the number of folded norms.
    """
    fused = 0
    for owner in detector.modules():
        if isinstance(owner, nn.Conv2d) and _fixed(getattr(owner, "norm", None)):
            _fuse(owner, owner.norm)
            owner.norm = None
            fused += 1
        if isinstance(owner, nn.Sequential):
            for conv, after, norm in _pairs(owner):
                _fuse(conv, norm)
                # timm's norms have an activation.
                owner[after] = (
                    nn.Sequential(norm.drop, norm.act) if hasattr(norm, "act") else nn.Identity()
                )
                fused += 1
    return fused


def _fixed(norm: nn.Module | None) -> bool:
    if isinstance(norm, nn.BatchNorm2d):
        return norm.track_running_stats and not norm.training
    return isinstance(norm, FrozenBatchNorm2d)


def _pairs(layers: nn.Sequential) -> Iterator[tuple[nn.Conv2d, int, nn.Module]]:
    for i in range(len(layers) - 1):
        conv, norm = layers[i], layers[i + 1]
        # Detectron2's Conv2d may have an activation, which then lies between the two.
        if isinstance(conv, nn.Conv2d) and _fixed(norm) and not getattr(conv, "activation", None):
            yield conv, i + 1, norm


def _fuse(conv: nn.Conv2d, norm: nn.Module) -> None:
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight,
        conv.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )


def cast_weights_(detector: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights of convolutions and linear layers to autocast's precision; the outputs are the same.

    Autocast caches its casts of trainable parameters alone: those of a frozen detector are cast at every use.
    """
    for layer in detector.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            for parameter in layer.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)


def compile_modules(detector: nn.Module) -> None:
    """Compile the backbone and the heads that compute on feature maps or regions, by ``torch.compile``.

    This is done in place, so that no name changes. Labelling, sampling and NMS, with shapes that depend on the
    data, are not compiled.
    """
    heads = getattr(detector, "roi_heads", None)
    parts = [detector.backbone, getattr(detector, "head", None), getattr(heads, "box_head", None)]
    for part in parts:
        for module in part if isinstance(part, nn.ModuleList) else [part]:
            if module is not None:
                module.compile(dynamic=None)


def is_frozen_norm(module: nn.Module) -> bool:
    """Return whether a module is a frozen batch norm, of Detectron2 or timm, whose statistics are buffers."""
    return hasattr(module, "running_var") and not isinstance(module, _NormBase)
