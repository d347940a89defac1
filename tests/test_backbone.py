"""Torchvision's classifiers as bottom-up networks: their shapes, weights, and detectors on them."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall as L
from detectron2.config import get_cfg, instantiate
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from torch import nn
from torchvision.models import WeightsEnum

from d2kd.benchmark import BenchmarkCase
from d2kd.comparison.detectors import detectors_from_run, load_data
from d2kd.comparison.detectors import load_detector as build_detector
from d2kd.config import add_d2kd_config, build_model_from_yacs, get_config, load, without_weights
from d2kd.config.saving import save_config
from d2kd.data import check_dataset
from d2kd.engine import Trainer
from d2kd.export import table
from d2kd.losses import DistillLosses, ImitationLoss
from d2kd.modeling import Distiller, Teacher, TorchvisionBackbone
from d2kd.modeling.backbone.fpn import build_torchvision_fpn_backbone
from d2kd.modeling.backbone.torchvision_backbone import (
    TORCHVISION_PIXEL_MEAN,
    TORCHVISION_PIXEL_STD,
    _last_blocks,
)
from d2kd.testing import forward_losses
from d2kd.tools import train, visualize
from d2kd.utils.errors import InputError

from .common import CLASSES, batch, build, tiny_faster_rcnn
from .tiny_run import draw_data, recipe

# The last block of each stride by torchvision's names, and its channels.
BLOCKS = {
    "mobilenet_v3_small": ([f"features.{k}" for k in (1, 3, 8, 12)], [16, 24, 48, 576]),
    "mobilenet_v3_large": ([f"features.{k}" for k in (3, 6, 12, 16)], [24, 40, 112, 960]),
    "efficientnet_b0": ([f"features.{k}" for k in (2, 3, 5, 8)], [24, 40, 112, 1280]),
    "resnet18": ([f"layer{k}" for k in (1, 2, 3, 4)], [64, 128, 256, 512]),
}
FEATURES = ("res2", "res3", "res4", "res5")
SMALL = "mobilenet_v3_small"


def images(*size, count=2):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(0))


def state_file(tmp_path, name=SMALL, **changes):
    """A classifier with statistics of its own, and the file that holds it."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    path = tmp_path / "classifier.pth"
    state = {k: v for k, v in (model.state_dict() | changes).items() if v is not None}
    torch.save(state, path)
    return model.eval(), str(path)


def idle(model):
    """Parameters that a backward did not reach, on which DDP would stop."""
    return [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None]


def assert_features_are(backbone, model, nodes, size):
    """Of an image, the backbone's are what the classifier computes at these nodes."""
    expected = {}
    for node, feature in nodes:

        def keep(module, args, output, key=feature):
            expected[key] = output.clone()  # the next module may write into it

        model.get_submodule(node).register_forward_hook(keep)
    with torch.no_grad():
        model(images(*size))
        found = backbone(images(*size))
    assert found.keys() == expected.keys() == set(FEATURES)
    for key in FEATURES:
        scale = float(expected[key].std())
        assert scale > 0
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("name", BLOCKS)
def test_shapes_gradients_and_modes(name):
    backbone = TorchvisionBackbone(name)
    shapes = backbone.output_shape()
    assert tuple(shapes) == FEATURES and [s.stride for s in shapes.values()] == [4, 8, 16, 32]
    assert [s.channels for s in shapes.values()] == BLOCKS[name][1]
    torch.manual_seed(0)
    for size in ((96, 65), (64, 64)):
        features = backbone.train()(images(*size))
        for key, shape in shapes.items():
            expected = (2, shape.channels, *(math.ceil(side / shape.stride) for side in size))
            assert features[key].shape == expected
    sum(x.mean() for x in features.values()).backward()
    assert backbone.training and not idle(backbone)
    with torch.no_grad():
        once, again = (backbone.eval()(images(96, 65)) for _ in range(2))
        one = backbone(images(96, 65)[:1])
    for key in FEATURES:  # no dropped blocks, no statistics of the batch
        assert torch.equal(once[key], again[key])
        atol = 1e-4 * float(one[key].std())
        torch.testing.assert_close(once[key][:1], one[key], rtol=1e-4, atol=atol)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_features_are_torchvisions_own(tmp_path, name, norm):
    model, path = state_file(tmp_path, name)
    backbone = TorchvisionBackbone(name, weights=path, norm=norm).eval()
    assert_features_are(backbone, model, zip(BLOCKS[name][0], FEATURES), (96, 65))
    own, whole = set(backbone.state_dict()), set(model.state_dict())
    assert own < whole and not any(key.startswith(("classifier.", "fc.")) for key in own)
    kinds = {type(m) for m in backbone.modules()} & {FrozenBatchNorm2d, nn.BatchNorm2d}
    assert kinds == {FrozenBatchNorm2d if norm == "FrozenBN" else nn.BatchNorm2d}


def test_frozen_statistics_stay():
    backbone = TorchvisionBackbone(SMALL, norm="FrozenBN").train()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    features = backbone(images(64, 64))
    sum(x.mean() for x in features.values()).backward()
    assert not idle(backbone)
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def test_momentum_of_the_statistics():
    moved = []
    for momentum in (None, 0.1):  # torchvision's own is 0.01 here
        torch.manual_seed(0)
        backbone = TorchvisionBackbone(SMALL, norm_momentum=momentum).train()
        backbone(images(64, 64))
        moved.append(backbone.state_dict()["features.0.1.running_mean"])
    assert moved[0].abs().max() > 0
    torch.testing.assert_close(moved[1], 10 * moved[0])


def test_stochastic_depth_and_copies():
    """In training blocks are dropped at random; a copy is a network of its own, in either mode."""
    backbone = TorchvisionBackbone("efficientnet_b0").train()
    twin = copy.deepcopy(backbone)
    torch.manual_seed(0)
    first = backbone(images(64, 64))["res5"]
    second = backbone(images(64, 64))["res5"]
    torch.manual_seed(0)
    assert torch.equal(first, twin(images(64, 64))["res5"]) and not torch.equal(first, second)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert twin.eval()(images(64, 64))["res5"].abs().max() == 0
    assert backbone.eval()(images(64, 64))["res5"].abs().max() > 0


def test_fewer_features_leave_out_what_lies_deeper():
    backbone = TorchvisionBackbone(SMALL, out_features=["res3", "res4"])
    assert list(backbone.output_shape()) == ["res3", "res4"]
    sum(x.mean() for x in backbone(images(64, 64)).values()).backward()
    assert not idle(backbone)
    assert not any(key.startswith("features.12.") for key in backbone.state_dict())


def test_nodes_of_ones_own():
    nodes = {"features.11": "deep", "features.4.block.0": "expansion"}
    backbone = TorchvisionBackbone(SMALL, nodes=nodes)
    shapes = {k: (s.channels, s.stride) for k, s in backbone.output_shape().items()}
    assert shapes == {"expansion": (96, 8), "deep": (96, 32)}
    assert backbone(images(64, 64))["expansion"].shape == (2, 96, 8, 8)
    one = TorchvisionBackbone(SMALL, nodes=nodes, out_features=["expansion"])
    assert list(one.output_shape()) == ["expansion"]


@pytest.mark.parametrize(
    "arguments, line",
    [
        (dict(name="mobilnet_v3_smal"), "mobilnet_v3_smal: .*such as mobilenet_v3_small"),
        (dict(name="fasterrcnn_resnet50_fpn"), "no such classifier"),
        (dict(name="vit_b_16"), "vit_b_16: fails on .*expected a CNN"),
        (dict(name="alexnet"), "alexnet: no feature 'res2'; expected a CNN"),
        (dict(name=SMALL, norm="GN"), "norm: GN; expected BN or FrozenBN"),
        (dict(name=SMALL, out_features=["res6"]), "no feature 'res6'; expected res2, res3"),
        (dict(name=SMALL, nodes={"features.99": "res3"}), "features.99: no such node"),
        (dict(name=SMALL, nodes={"classifier.0": "res3"}), r"classifier.0: gives \(1, 1024\)"),
        (dict(name=SMALL, weights="IMAGENET1K_V9"), "IMAGENET1K_V9: .* or IMAGENET1K_V1 or"),
        (dict(name=SMALL, weights="nowhere.pth"), "nowhere.pth: no such file"),
    ],
)
def test_bad_arguments(arguments, line):
    with pytest.raises(InputError, match=line) as error:
        TorchvisionBackbone(**arguments)
    assert "\n" not in str(error.value)


KEY = "features.0.0.weight"


@pytest.mark.parametrize(
    "name, changes, line",
    [
        (SMALL, {KEY: None}, rf"1 missing \(such as {KEY}\)"),
        (SMALL, {KEY: torch.zeros(3, 3)}, rf"1 misshapen \(such as {KEY}\)"),
        ("resnet18", {}, "missing"),
        (SMALL, None, "cannot be read"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, name, changes, line):
    _, path = state_file(tmp_path, **changes or {})
    if changes is None:
        Path(path).write_bytes(b"PK\x03\x04 not a checkpoint")
    with pytest.raises(InputError, match=line):
        TorchvisionBackbone(name, weights=path)


def test_weights_by_torchvisions_name(tmp_path, monkeypatch):
    """The file torchvision would download, found in its cache."""
    model, path = state_file(tmp_path)
    url = torchvision.models.get_model_weights(SMALL).DEFAULT.url
    cache = tmp_path / "hub" / "checkpoints" / url.rsplit("/", 1)[1]
    cache.parent.mkdir(parents=True)
    cache.write_bytes((tmp_path / "classifier.pth").read_bytes())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    backbone = TorchvisionBackbone(SMALL, weights="DEFAULT")
    assert torch.equal(backbone.state_dict()[KEY], model.state_dict()[KEY])
    cache.unlink()

    def refuse(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(
        InputError, match=rf"bottom_up.weights: DEFAULT of {SMALL} cannot be fetched \(no route\)"
    ):
        TorchvisionBackbone(SMALL, weights="DEFAULT")


def published(name):
    """Random weights as torchvision's file has them: densenet's under names from before modules had any with dots."""
    options = {"init_weights": False} if name == "googlenet" else {}
    torch.manual_seed(0)
    state = torchvision.models.get_model(name, weights=None, **options).state_dict()
    dotted = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))(\d)")
    return {dotted.sub(r"\1.\2", k): v for k, v in state.items() if "num_batches_tracked" not in k}


@pytest.mark.parametrize("name", ["densenet121", "googlenet"])
def test_weights_are_read_as_torchvision_reads_them(name, monkeypatch):
    """Names of old files are renamed, and what the weights want done to their images is done."""
    state = published(name)
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: dict(state))
    model = torchvision.models.get_model(name, weights="DEFAULT").eval()
    backbone = TorchvisionBackbone(name, weights="DEFAULT").eval()
    assert_features_are(backbone, model, _last_blocks(model, name).items(), (64, 96))


def test_the_statistics_are_those_of_torchvisions_weights():
    transforms = torchvision.models.get_model_weights(SMALL).DEFAULT.transforms()
    assert TORCHVISION_PIXEL_MEAN == pytest.approx([255 * x for x in transforms.mean])
    assert TORCHVISION_PIXEL_STD == pytest.approx([255 * x for x in transforms.std])


@pytest.mark.parametrize("name", ["efficientnet_b0", SMALL])
def test_a_student_of_another_kind_steps_and_is_saved_plain(tmp_path, name):
    path = "model.backbone.bottom_up.name"
    node = load("baselines/faster_rcnn_mobilenet_v3_shapes.py", [f"{path}={name}"]).model
    node.roi_heads.num_classes = CLASSES
    student = build(node)
    losses = instantiate(get_config("../projects/TAR/configs/tar_shapes.py").model.losses)
    teacher = Teacher(build(tiny_faster_rcnn()), None)
    model = Distiller(student=student, teacher=teacher, losses=losses, max_iter=2).train()
    assert_trains(model)
    DetectionCheckpointer(model.student, str(tmp_path)).save("model_final")
    plain = build(node, seed=1)
    assert DetectionCheckpointer(plain).load(str(tmp_path / "model_final.pth")) == {}
    with torch.no_grad():
        examples = batch(sizes=((65, 96),), objects=(1,))
        found, expected = (m.eval()(examples)[0]["instances"] for m in (plain, student))
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)


def assert_trains(model):
    """Every parameter, with finite losses, on images of odd sizes."""
    losses = forward_losses(model, batch(sizes=((65, 96), (64, 33))))
    assert all(torch.isfinite(value) for value in losses.values())
    sum(losses.values()).backward()
    assert not idle(model)


@pytest.mark.parametrize(
    "file, backbone, levels",
    [
        ("faster_rcnn_R_50_FPN_1x", "build_{}_fpn_backbone", "p2 p3 p4 p5 p6"),
        ("retinanet_R_50_FPN_1x", "build_retinanet_{}_fpn_backbone", "p3 p4 p5 p6 p7"),
    ],
)
@pytest.mark.parametrize("package, name", [("torchvision", SMALL), ("timm", "test_efficientnet")])
@pytest.mark.parametrize("in_features_left_out", [False, True])
def test_yacs(file, backbone, levels, package, name, in_features_left_out):
    cfg = get_cfg()
    add_d2kd_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(f"COCO-Detection/{file}.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = backbone.format(package)
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    if in_features_left_out:
        cfg.MODEL.FPN.IN_FEATURES = []
    cfg.MODEL[package.upper()].NAME = name
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
    model = build_model(cfg).train()
    assert list(model.backbone.output_shape()) == levels.split()
    assert_trains(model)


def test_yacs_weights_and_norm(tmp_path):
    model, path = state_file(tmp_path)
    cfg = get_cfg()
    add_d2kd_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.merge_from_list(["MODEL.TORCHVISION.NAME", SMALL, "MODEL.TORCHVISION.WEIGHTS", path])
    momentum = copy.deepcopy(cfg)
    momentum.merge_from_list(["MODEL.TORCHVISION.NORM_MOMENTUM", "0.1"])
    for given, wanted in ((cfg, 0.01), (momentum, 0.1)):
        bottom_up = build_torchvision_fpn_backbone(given, None).bottom_up
        norms = [m for m in bottom_up.modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms and all(norm.momentum == wanted for norm in norms)
    cfg.merge_from_list(
        ["MODEL.TORCHVISION.NORM", "FrozenBN", "MODEL.META_ARCHITECTURE", "RetinaNet"]
    )
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_torchvision_fpn_backbone"
    cfg.MODEL.FPN.IN_FEATURES = ["res4", "res5"]
    cfg.MODEL.RETINANET.IN_FEATURES = ["p4", "p5", "p6", "p7"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256]]
    bottom_up = build_model(cfg).backbone.bottom_up
    assert torch.equal(bottom_up.state_dict()[KEY], model.state_dict()[KEY])
    assert any(isinstance(m, FrozenBatchNorm2d) for m in bottom_up.modules())
    assert list(bottom_up.output_shape()) == ["res4", "res5"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of a finished run whose detectors began with torchvision's weights, which cannot be fetched now."""
    node = tiny_faster_rcnn()
    node.backbone.bottom_up = L(TorchvisionBackbone)(
        name=SMALL, weights="DEFAULT", out_features=list(FEATURES)
    )
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save({"model": build(without_weights(node)).state_dict()}, folder / "model_final.pth")
    teacher = L(Teacher)(detector=node, weights=str(folder / "model_final.pth"))
    losses = L(DistillLosses)(imitation=L(ImitationLoss)())
    model = L(Distiller)(student=node, teacher=teacher, losses=losses, max_iter=4)
    draw_data(tmp_path / "data")
    save_config(recipe(tmp_path / "data", folder, model), folder / "config.yaml")

    def refuse(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", refuse)
    return folder


def trained_on(config):
    config.model.student = tiny_faster_rcnn()
    return Trainer(config)


def compared(config):
    detectors, dataset = detectors_from_run(Path(config.train.output_dir))
    return [build_detector(d, load_data(dataset), torch.device("cpu")) for d in detectors]


def evaluated(config):
    config.train.init_checkpoint = f"{config.train.output_dir}/model_final.pth"
    return train.evaluate(config, resume=False)


def drawn(config):
    [dataset] = check_dataset(config.dataloader.test.dataset.names)
    return visualize.detectors_of(config, {}, dataset)


def measured(config):
    return table.teacher_row(config, build(tiny_faster_rcnn()))


def benched(config):
    file = Path(config.train.output_dir, "config.yaml")
    return instantiate(
        BenchmarkCase("it", str(file), image_sizes=((64, 64),), device="cpu").recipe().model
    )


def exported(config):
    return table.build_student(config, f"{config.train.output_dir}/model_final.pth")


@pytest.mark.parametrize(
    "use", [trained_on, compared, benched, evaluated, drawn, exported, measured]
)
def test_where_a_checkpoint_brings_all_weights_none_are_fetched(run, use):
    config = load(str(run / "config.yaml"))
    assert use(config)
    assert config.model.teacher.detector.backbone.bottom_up.weights == "DEFAULT"
    with pytest.raises(InputError, match="no route"):
        instantiate(config.model.teacher)


def test_a_yacs_detector_without_weights():
    cfg = get_cfg()
    add_d2kd_config(cfg)
    cfg.MODEL.TORCHVISION.WEIGHTS = "DEFAULT"
    node = L(build_model_from_yacs)(config=yaml.safe_load(cfg.dump()))
    assert without_weights(node).config.MODEL.TORCHVISION.WEIGHTS == ""
    assert node.config.MODEL.TORCHVISION.WEIGHTS == "DEFAULT"
