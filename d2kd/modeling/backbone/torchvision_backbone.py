"""Bottom-up networks made of torchvision's classifiers."""

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
from ..weights import load_checkpoint, load_state_dict_checked

TORCHVISION_PIXEL_MEAN = [123.675, 116.28, 103.53]
"""Mean of the images with which torchvision's weights were trained: RGB, in [0, 255] as in Detectron2."""

TORCHVISION_PIXEL_STD = [58.395, 57.12, 57.375]
"""Their standard deviation: RGB, in [0, 255]."""

STAGES = {4: "res2", 8: "res3", 16: "res4", 32: "res5"}
"""Feature names by stride; those of Detectron2's ResNets, whatever the classifier."""

_SIDE = 128  # side in pixels of the test image with which strides are computed


class TorchvisionBackbone(Backbone):
    """A torchvision classifier without its head, as a bottom-up network.

    Parameters and buffers keep torchvision's names. Layers that no feature needs, such as the classifier, are
    removed, so that every parameter receives a gradient.

    By default the feature of a stride is the output of the last block at that stride. At stride 32 this
    includes the final 1x1 expansion of MobileNets (960 channels in ``mobilenet_v3_large``) and
    EfficientNets, as in torchvision's detectors on MobileNetV3: it is pretrained with the classifier,
    and the lateral convolution of an FPN gets a wide activation rather than a linear bottleneck.

    Args:
        name: a convolutional classifier by its name in torchvision, such as "mobilenet_v3_small".
        weights: weights by their name in torchvision ("DEFAULT", "IMAGENET1K_V1"), downloaded once, or the path
            of a state_dict of the whole classifier or of this backbone. torchvision's weights need RGB images,
            :data:`TORCHVISION_PIXEL_MEAN` and :data:`TORCHVISION_PIXEL_STD`. None: random initialization.
        norm: "BN", or "FrozenBN" to fix the statistics that were loaded.
        norm_momentum: momentum of "BN". None: torchvision's, which in MobileNetV3 is 0.01 and needs many
            hundreds of steps until the running statistics can be used in evaluation.
        out_features: names of the features to return; by default all.
        nodes: {node of torchvision's graph: feature name}, such as ``{"features.3": "res3"}``, instead of
            "res2" to "res5" at strides 4 to 32. Nodes are named as by ``create_feature_extractor``.

    Attributes:
        pretrained: whether the weights are torchvision's.
        has_weights: whether it has any weights, not random ones.
        pixel_statistics: mean and standard deviation of the images with which they were trained, in RGB.

    Raises:
        InputError: there is no such classifier, norm, feature or node; a node's output is no feature map; the
            classifier has no feature map at some stride; the weights cannot be read or do not fit.
    """

    pixel_statistics = TORCHVISION_PIXEL_MEAN, TORCHVISION_PIXEL_STD

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
        self.pretrained, self.has_weights = weights in _known(name), bool(weights)
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
        # Only the extractor's modules and its two compiled functions are kept. The extractor itself would add
        # a prefix to torchvision's parameter names, and would recompile at each change of mode.
        for child_name, child in extractor.named_children():
            self.add_module(child_name, child)
        self._forward = {mode: type(extractor.train(mode)).forward for mode in (False, True)}

        features = _eval_forward(self, _test_image(self))
        for node, feature in nodes.items():
            shape = tuple(features[feature].shape)
            if _stride(features[feature]) is None:
                raise InputError(node, f"gives {shape} of a {_SIDE}x{_SIDE} image", "a feature map")
        self._out_feature_strides = {key: _stride(x) for key, x in features.items()}
        self._out_feature_channels = {key: x.shape[1] for key, x in features.items()}
        self._out_features = sorted(features, key=self._out_feature_strides.get)

        if weights and not self.pretrained:
            load_state_dict_checked(self, _checkpoint(name, weights), weights, whole=False)
        if norm_momentum is not None:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = norm_momentum
        if norm == "FrozenBN":
            FrozenBatchNorm2d.convert_frozen_batchnorm(self)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the features (N, Ci, H / stride i, W / stride i) of images (N, 3, H, W), by name.

        If a side is not divisible by the stride, most classifiers round up, and some round down.
        """
        return self._forward[self.training](self, images)


def _known(name: str) -> Mapping[str, WeightsEnum]:
    """Return torchvision's weights of a classifier, by name."""
    return torchvision.models.get_model_weights(name).__members__


def _classifier(name: str, weights: str | None = None) -> nn.Module:
    """Build a torchvision classifier. If ``weights`` is not a name that torchvision has, they are random."""
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        near = difflib.get_close_matches(str(name), names, cutoff=0.4) or ["resnet18"]
        raise InputError(name, "torchvision has no such classifier", f"such as {', '.join(near)}")
    if weights not in _known(name):
        return torchvision.models.get_model(name, weights=None)
    try:
        # By torchvision's builder: some files have old parameter names, and some models transform their input.
        return torchvision.models.get_model(name, weights=_known(name)[weights], progress=False)
    except Exception as error:  # no network, no such address, a damaged file
        found = f"{weights} of {name} cannot be fetched ({error})"
        raise InputError(
            "bottom_up.weights", found, "reachable weights, a file, or null"
        ) from error


def _checkpoint(name: str, weights: str) -> dict:
    """Read the weights of a classifier from a file."""
    try:
        return load_checkpoint(weights)
    except InputError as error:
        expected = f"{error.expected}, or {' or '.join(_known(name))}"
        raise InputError(weights, error.found, expected) from error


def _test_image(module: nn.Module) -> Tensor:
    return next(module.parameters()).new_zeros(1, 3, _SIDE, _SIDE)


@torch.no_grad()
def _eval_forward(module: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Run a forward in ``eval()``, which changes no running statistics."""
    training = module.training
    try:
        return module.eval()(image)
    finally:
        module.train(training)


def _stride(x: Tensor) -> int | None:
    """Return the stride of a feature map (1, C, H, W) of the test image; None for anything else."""
    if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[2] != x.shape[3]:
        return None
    return None if _SIDE % x.shape[2] else _SIDE // x.shape[2]


def _last_blocks(model: nn.Module, name: str) -> dict[str, str]:
    """Return {node: feature} of the last block of each stride; a block is a module that at most halves its input.

    Blocks inside other blocks do not count. Otherwise, the first convolution of a block that later halves its
    input would be the last module of the stride before.
    """
    strides: dict[str, int] = {}  # of blocks, in the order in which their forwards end

    def stride_hook(path: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            before, after = (_stride(x) for x in (*inputs[:1], output))
            if before and after and after <= 2 * before:
                strides[path] = after

        return hook

    hooks = [
        m.register_forward_hook(stride_hook(path)) for path, m in model.named_modules() if path
    ]
    try:
        _eval_forward(model, _test_image(model))
    except Exception as error:  # transformers accept one image size, and raise various errors
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
    """Build torchvision's feature extractor of a classifier, without the layers that no feature needs."""
    names = get_graph_node_names(model, suppress_diff_warning=True)[1]
    for node in nodes:
        if not any(name == node or name.startswith(f"{node}.") for name in names):
            near = difflib.get_close_matches(node, names) or names[:3]
            raise InputError(node, "no such node", f"such as {', '.join(near)}")
    return create_feature_extractor(model, nodes, suppress_diff_warning=True)


def add_torchvision_config(cfg: CfgNode) -> None:
    """Add ``MODEL.TORCHVISION``, the arguments of a :class:`TorchvisionBackbone`, to a yacs config."""
    cfg.MODEL.TORCHVISION = CfgNode()
    cfg.MODEL.TORCHVISION.NAME = "mobilenet_v3_large"
    cfg.MODEL.TORCHVISION.WEIGHTS = ""
    cfg.MODEL.TORCHVISION.NORM = "BN"
    cfg.MODEL.TORCHVISION.NORM_MOMENTUM = None  # torchvision's
