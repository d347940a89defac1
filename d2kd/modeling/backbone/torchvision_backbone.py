"""Bottom-up networks that Detectron2 does not build by a name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence

import torch
import torchvision.models
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import Backbone
from torch import Tensor, nn
from torchvision.models import WeightsEnum
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from ...utils.errors import InputError
from ..weights import fit, read

TORCHVISION_PIXEL_MEAN = [123.675, 116.28, 103.53]
"""Mean of the images torchvision's weights were trained on: RGB, in Detectron2's unit, 0 to 255."""

TORCHVISION_PIXEL_STD = [58.395, 57.12, 57.375]
"""Their standard deviation: RGB, 0 to 255."""

STAGES = {4: "res2", 8: "res3", 16: "res4", 32: "res5"}
"""Features by stride, under the names that Detectron2's configs know them by, residual or not."""

_SIDE = 128  # of the image by which strides are found, in pixels


class TorchvisionBackbone(Backbone):
    """A torchvision classifier without its head, as a bottom-up network.

    Parameters and buffers have torchvision's own names. What no feature needs, such as the classifier, is
    left out, so that every parameter receives a gradient.

    By default the feature of a stride is the output of the last block at that stride. At stride 32 this
    takes in the final 1x1 expansion of MobileNets (960 channels in ``mobilenet_v3_large``) and
    EfficientNets, as torchvision's own detectors on MobileNetV3 do: it is trained with the classifier,
    and the lateral convolution reads a wide activation rather than a linear bottleneck.

    Args:
        name: torchvision's name of a convolutional classifier, such as "mobilenet_v3_small".
        weights: torchvision's name of weights ("DEFAULT", "IMAGENET1K_V1"), downloaded once, or the path of
            a state_dict of the whole classifier or of this backbone. They want RGB images,
            :data:`TORCHVISION_PIXEL_MEAN` and :data:`TORCHVISION_PIXEL_STD`. None: drawn at random.
        norm: "BN", or "FrozenBN" to keep the weights' statistics.
        norm_momentum: share of each batch in the statistics of "BN". None: torchvision's own, which in
            MobileNetV3 is 0.01 and needs many hundreds of steps before evaluation sees right statistics.
        out_features: the features to return; by default all.
        nodes: features by node of torchvision's graph, such as ``{"features.3": "res3"}``, instead of
            "res2" to "res5" at strides 4 to 32. Names are as ``create_feature_extractor`` has them.

    Attributes:
        pretrained: whether its weights are torchvision's own.

    Raises:
        InputError: no such classifier, norm, feature or node; a node gives no feature map; the classifier
            has none at some stride; the weights cannot be read or do not fit.
    """

    def __init__(
        self,
        name: str,
        weights: str | None = None,
        norm: str = "BN",
        norm_momentum: float | None = None,
        out_features: Sequence[str] | None = None,
        nodes: Mapping[str, str] | None = None,
    ):
        super().__init__()
        if norm not in ("BN", "FrozenBN"):
            raise InputError("norm", norm, "BN or FrozenBN")
        model = _classifier(name, weights)
        self.pretrained = weights in _known(name)
        wanted = list(out_features or (nodes or STAGES).values())
        nodes = dict(nodes or _last_blocks(model, name))
        for feature in wanted:
            if feature not in nodes.values():
                has = ", ".join(nodes.values())
                raise InputError(
                    name, f"no feature {feature!r}", has or "a CNN with strides 4 to 32"
                )
        nodes = {node: feature for node, feature in nodes.items() if feature in wanted}
        extractor = _extractor(model, nodes)
        # The extractor lends its modules and the two functions it was compiled to, and goes: kept whole,
        # it would put its own name before torchvision's, and compile anew at each change of mode.
        for child_name, child in extractor.named_children():
            self.add_module(child_name, child)
        self._forward = {mode: type(extractor.train(mode)).forward for mode in (False, True)}

        features = _quietly(self, _image(self))
        for node, feature in nodes.items():
            shape = tuple(features[feature].shape)
            if _stride(features[feature]) is None:
                raise InputError(node, f"gives {shape} of a {_SIDE}x{_SIDE} image", "a feature map")
        self._out_feature_strides = {key: _stride(x) for key, x in features.items()}
        self._out_feature_channels = {key: x.shape[1] for key, x in features.items()}
        self._out_features = sorted(features, key=self._out_feature_strides.get)

        if weights and not self.pretrained:
            fit(self, _checkpoint(name, weights), weights, whole=False)
        if norm_momentum is not None:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = norm_momentum
        if norm == "FrozenBN":
            FrozenBatchNorm2d.convert_frozen_batchnorm(self)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The features (N, Ci, H / stride i, W / stride i) of images (N, 3, H, W).

        Where the sides are no multiples of the strides, most classifiers round up; some round down.
        """
        return self._forward[self.training](self, images)


def _known(name: str) -> Mapping[str, WeightsEnum]:
    """torchvision's weights of a classifier, by name."""
    return torchvision.models.get_model_weights(name).__members__


def _classifier(name: str, weights: str | None = None) -> nn.Module:
    """A torchvision classifier with the weights of that name; random ones if it is none of torchvision's."""
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        near = difflib.get_close_matches(str(name), names, cutoff=0.4) or ["resnet18"]
        raise InputError(name, "torchvision has no such classifier", f"such as {', '.join(near)}")
    if weights not in _known(name):
        return torchvision.models.get_model(name, weights=None)
    try:
        # Its own builder: some files name parameters as they were once called, and some weights want
        # their input turned first.
        return torchvision.models.get_model(name, weights=_known(name)[weights], progress=False)
    except Exception as error:  # no network, no such address, a damaged file
        raise InputError(
            weights, f"cannot be fetched ({error})", "reachable weights, or a file"
        ) from error


def _checkpoint(name: str, weights: str) -> dict:
    """The weights of a classifier out of a file."""
    try:
        return read(weights)
    except InputError as error:
        expected = f"{error.expected}, or {' or '.join(_known(name))}"
        raise InputError(weights, error.found, expected) from error


def _image(module: nn.Module) -> Tensor:
    return next(module.parameters()).new_zeros(1, 3, _SIDE, _SIDE)


@torch.no_grad()
def _quietly(module: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """A forward that changes no statistics."""
    training = module.training
    try:
        return module.eval()(image)
    finally:
        module.train(training)


def _stride(x: Tensor) -> int | None:
    """The stride of a feature map (1, C, H, W) of the image; None for anything else."""
    if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[2] != x.shape[3]:
        return None
    return None if _SIDE % x.shape[2] else _SIDE // x.shape[2]


def _last_blocks(model: nn.Module, name: str) -> dict[str, str]:
    """The last block of each stride, by its node; a block is a module that halves its input at most.

    Only blocks inside no other block count, or the first convolution of a block that goes on to halve
    its input would be the last module at the stride before.
    """
    strides: dict[str, int] = {}  # of blocks, in the order in which they end

    def listen(path: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            before, after = (_stride(x) for x in (*inputs[:1], output))
            if before and after and after <= 2 * before:
                strides[path] = after

        return hook

    hooks = [m.register_forward_hook(listen(path)) for path, m in model.named_modules() if path]
    try:
        _quietly(model, _image(model))
    except Exception as error:  # transformers want one size of image, and each says so differently
        raise InputError(
            name, f"fails on {_SIDE}x{_SIDE} pixels ({error})", "a CNN for images of any size"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    last: dict[int, str] = {}
    for path, stride in strides.items():
        if not any(path.startswith(f"{block}.") for block in strides):
            last[stride] = path
    return {last[stride]: feature for stride, feature in STAGES.items() if stride in last}


def _extractor(model: nn.Module, nodes: Mapping[str, str]) -> nn.Module:
    """torchvision's feature extractor of a classifier, with what no feature needs removed."""
    names = get_graph_node_names(model, suppress_diff_warning=True)[1]
    for node in nodes:
        if not any(name == node or name.startswith(f"{node}.") for name in names):
            near = difflib.get_close_matches(node, names) or names[:3]
            raise InputError(node, "no such node", f"such as {', '.join(near)}")
    return create_feature_extractor(model, nodes, suppress_diff_warning=True)


def add_torchvision_config(cfg: CfgNode) -> None:
    """Add ``MODEL.TORCHVISION`` to a yacs config: what a :class:`TorchvisionBackbone` is built of."""
    cfg.MODEL.TORCHVISION = CfgNode()
    cfg.MODEL.TORCHVISION.NAME = "mobilenet_v3_large"
    cfg.MODEL.TORCHVISION.WEIGHTS = ""
    cfg.MODEL.TORCHVISION.NORM = "BN"
    cfg.MODEL.TORCHVISION.NORM_MOMENTUM = None  # torchvision's own
