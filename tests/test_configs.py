"""Every config instantiates and takes a step; every way to name a detector gives one."""

import copy
import re
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import LazyConfig, instantiate
from detectron2.model_zoo import get_checkpoint_url
from detectron2.model_zoo.model_zoo import _ModelZooUrls
from detectron2.utils.events import EventStorage
from omegaconf import OmegaConf

from d2kd.config import (
    METHODS,
    apply_overrides,
    distill,
    get_config,
    get_config_file,
    get_detector_config,
    incremental_recipe,
    is_distiller,
    load,
    method,
    student_node,
    with_defaults,
    with_downscaled_student,
    without_priors,
    zoo_detector,
)
from d2kd.engine.optimizer import DistillerOptimizer, build_optimizer
from d2kd.modeling import Distiller, Teacher
from d2kd.structures.class_map import class_names

from .common import (
    HAS_VITDET,
    ROOT,
    batch,
    build,
    one_thread,
    refusal,
    tiny_faster_rcnn,
    tiny_retinanet,
)
from .resume_runs import differences

FILES = [*ROOT.glob("configs/baselines/*.py"), *ROOT.glob("projects/*/configs/*.py")]
RECIPES = sorted(str(path.relative_to(ROOT)) for path in FILES)
PROJECTS = {path.name for path in ROOT.glob("projects/[A-Z]*")}
assert {recipe.split("/")[1] for recipe in RECIPES} == PROJECTS | {"baselines"}
SMALL = "common/models/faster_rcnn_small.py", "weights.pth"


# The heaviest, each of which has a sibling that differs in the number of layers, stages or iterations.
HEAVY = [
    x
    for x in RECIPES
    if re.search(r"[RX]_101|cascade|mask_rcnn_R_50_FPN_3x|40_10x4|50_30|60_20", x)
]
# And those that have a sibling with another number of classes, or with a smaller backbone.
ALIKE = r"first_[567]0|70_10|increment3|(lwf|fine_tuning)_gfl|(tar|dkd)_.*mobilenet|lite0_FPN"
ALIKE += r"|vitdet|dinov2"
HEAVY += [x for x in RECIPES if re.search(ALIKE, x)]


@pytest.mark.parametrize(
    "recipe", [pytest.param(x, marks=[pytest.mark.sweep] * (x in HEAVY)) for x in RECIPES]
)
def test_every_recipe_takes_a_step(recipe):
    if "vitdet" in recipe and not HAS_VITDET:
        pytest.skip("a Detectron2 after 0.6 is needed")
    config = load(str(ROOT / recipe))
    model = config.model
    if is_distiller(model):
        model.teacher.weights = None
        _untrained(model.teacher.detector)
        without_priors(model.losses)
    _untrained(student_node(model))
    inherit = tuple(model.get("inherit", ()))
    model = instantiate(model).train()
    if inherit:
        _the_weights_are_inherited(model, inherit)
    old = student_node(config.model).get("num_old_classes", 0)
    new = student_node(config.model).get("num_classes", 80) - old
    examples = batch(sizes=((96, 128),), objects=(2,))
    for example in examples:
        example["instances"].gt_classes = old + example["instances"].gt_classes % new
    with EventStorage(start_iter=1):
        losses = model(examples)
    assert all(torch.isfinite(value) for value in losses.values()), losses
    distilled = isinstance(model, Distiller) and len(model.losses.by_name) > 0
    assert distilled == any(key.startswith("distill/") for key in losses)
    sum(losses.values()).backward()
    build_optimizer(with_defaults(config), model).step()


def _the_weights_are_inherited(model, inherit):
    """All of an old detector, rows of its classes among more; of another, all but the backbone."""
    state, given = model.student.state_dict(), model.teacher.detector.state_dict()
    if inherit == ("",):
        assert state.keys() == given.keys()
        rows = {f"{model.student.classifier}.{name}" for name in ("weight", "bias")}
        for key, value in given.items():
            assert torch.equal(state[key][: len(value)] if key in rows else state[key], value), key
        return
    beyond = {key for key in state if not key.startswith("backbone.bottom_up.")}
    assert beyond == {key for key in state if key.startswith(inherit)}
    others = {key for key in beyond if key not in given or given[key].shape != state[key].shape}
    assert all(key.startswith("backbone.fpn_lateral") for key in others)
    assert all(torch.equal(state[key], given[key]) for key in beyond - others)


def _untrained(node):
    """Live norms in place of frozen ones, whose statistics only trained weights make right."""
    if "config" in node:
        node.config.MODEL.RESNETS.NORM = "BN"
        node.config.MODEL.BACKBONE.FREEZE_AT = 0
    elif "bottom_up" not in node.backbone:  # of a transformer
        if "pretrained" in node.backbone:
            node.backbone.pretrained = False
    elif "weights" in node.backbone.bottom_up:
        node.backbone.bottom_up.weights = None
        node.backbone.bottom_up.norm = "BN"
    elif "freeze_at" in node.backbone.bottom_up:
        node.backbone.bottom_up.stem.norm = "BN"
        node.backbone.bottom_up.stages.norm = "BN"
        node.backbone.bottom_up.freeze_at = 0


@pytest.mark.parametrize(
    "name, kind",
    [
        ("COCO-Detection/retinanet_R_50_FPN_1x.py", "RetinaNet"),
        ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", "RetinaNet"),
        ("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", "GeneralizedRCNN"),
        ("baselines/faster_rcnn_R_50_FPN_1x.py", "GeneralizedRCNN"),
        ("projects/TAR/configs/tar_shapes.py", "GeneralizedRCNN"),
    ],
)
def test_a_detector_by_any_name(name, kind):
    model = instantiate(get_detector_config(name))
    assert type(model).__name__ == kind and model.input_format == "BGR"


def test_a_yaml_of_ones_own_brings_its_statistics(tmp_path):
    path = tmp_path / "mine.yaml"
    levels = ["res3", "res4", "res5"]
    model = {
        "META_ARCHITECTURE": "RetinaNet",
        **{"PIXEL_MEAN": [1.0, 2.0, 3.0], "PIXEL_STD": [4.0, 5.0, 6.0]},
        "BACKBONE": {"NAME": "build_retinanet_resnet_fpn_backbone"},
        **{"RESNETS": {"OUT_FEATURES": levels}, "FPN": {"IN_FEATURES": levels}},
        "RETINANET": {"NUM_CLASSES": 7},
    }
    path.write_text(yaml.safe_dump({"MODEL": model, "INPUT": {"FORMAT": "RGB"}}))
    node = get_detector_config(str(path))
    path.unlink()  # the node holds the config itself
    node.config.MODEL.RETINANET.NUM_CLASSES = 5
    model = instantiate(OmegaConf.create(node, flags={"allow_objects": True}))
    assert model.pixel_mean.flatten().tolist() == [1, 2, 3] and model.num_classes == 5
    assert Teacher(model, None, image_format="BGR").flip_channels


def test_distill_leaves_its_base_alone_and_follows_its_channel_order():
    base = load("baselines/faster_rcnn_small_shapes.py")
    base.dataloader.train.mapper.image_format = "RGB"
    before = copy.deepcopy(base)
    given = dict(teacher=SMALL, **method("tar"))
    assert distill(with_downscaled_student(base, 2), **given).model.teacher.image_format == "RGB"
    recipe = distill(base, **given)
    assert base == before and recipe.model.teacher.image_format == "RGB"
    again = distill(
        OmegaConf.create(recipe._asdict(), flags={"allow_objects": True}),
        teacher=SMALL,
        **method("imitation"),
        inherit=["backbone.fpn_"],
        proposals_from="both",
    )
    assert not is_distiller(again.model.student), "a distiller was put inside a distiller"
    assert (list(again.model.inherit), again.model.proposals_from) == (["backbone.fpn_"], "both")
    assert recipe.model.proposals_from == "student"


def test_a_distilled_recipe_is_taken_wherever_a_recipe_is():
    made = distill("baselines/faster_rcnn_small_shapes.py", teacher=SMALL, **method("tar"))
    made.train.max_iter, made.model.teacher.weights = 7, None
    assert isinstance(instantiate(made.model), Distiller) and made.model.max_iter == 7
    assert apply_overrides(made, ["train.max_iter=9"]).model.max_iter == 9
    assert made.train.max_iter == 7
    again = distill(made, teacher=SMALL, **method("imitation"))
    assert "imitation" in again.model.losses and again.model.max_iter == 7
    smaller = with_downscaled_student(made, 2)
    assert smaller.dataloader.train.mapper.scale == 2 and smaller.model == made.model


def test_one_of_several_recipes_in_a_file(tmp_path, refuses):
    file = tmp_path / "several.py"
    file.write_text(
        "from d2kd.config import distill, load, method\n"
        "_base = load('baselines/faster_rcnn_small_shapes.py')\n"
        "model, dataloader, optimizer, lr_multiplier, train = distill(\n"
        f"    _base, teacher={SMALL}, **method('tar'))\n"
        "alone = distill(_base, teacher=('baselines/retinanet_small_shapes.py', 'x'), "
        "**method('imitation'))\n"
        "plain = dict(_base)\nnumber = 5\n"
    )
    assert "tar" in load(str(file)).model.losses
    alone = load(f"{file}:alone", ["train.max_iter=3"])
    assert "imitation" in alone.model.losses and alone.model.max_iter == 3
    assert get_detector_config(f"{file}:alone") == alone.model.student
    assert load(f"{file}:plain") == load("baselines/faster_rcnn_small_shapes.py")
    refuses(lambda: load(f"{file}:alon"), "several.py:alon: no 'alon' in the file; expected the")
    refuses(lambda: load(f"{file}:number"), "several.py:number: defines no model")


def test_a_recipe_survives_being_saved(tmp_path):
    """The config.yaml of a run is a recipe again, and its student a detector."""
    config = load("projects/TAR/configs/tar_shapes.py", ["model.teacher.weights=null"])
    path = str(tmp_path / "config.yaml")
    LazyConfig.save(config, path)
    saved = load(path, ["train.max_iter=7", "model.losses.tar.temperature=2.0"])  # a default
    assert is_distiller(saved.model) and saved.model.max_iter == 7
    assert saved.model.losses.tar.temperature == 2.0
    model = instantiate(saved.model).train()
    with EventStorage():
        assert "distill/loss_tar_classification" in model(batch())
    names = instantiate(get_detector_config(path)).state_dict().keys()
    assert names == model.student.state_dict().keys()


def test_what_a_node_builds():
    """A saved recipe names the class; one of another name that ends alike is another's."""
    for target in (Distiller, "d2kd.modeling.Distiller", "my.OwnDistiller"):
        node = OmegaConf.create({"_target_": target}, flags={"allow_objects": True})
        assert is_distiller(node) == (target != "my.OwnDistiller")


def test_get_config_gives_a_fresh_copy():
    get_config("common/train.py").train.max_iter = 3
    assert get_config("common/train.py").train.max_iter != 3
    assert get_config_file("common/train.py").is_file()
    assert load("COCO-Detection/retinanet_R_50_FPN_1x.py").train.device == "auto"


def test_an_increment_is_trained_on_its_own_classes_and_tested_on_all_so_far():
    data = load("projects/ERD/configs/erd_shapes.py").dataloader
    assert [data[part].dataset.names.cumulative for part in ("train", "test")] == [False, True]


@pytest.mark.parametrize("name", METHODS)
def test_methods_by_name(name):
    family = "gfl" if name in ("bckd", "crosskd", "ld", "pgd") else "faster_rcnn"
    teacher = f"common/models/{family}_small.py", "weights.pth"
    recipe = distill(f"baselines/{family}_small_shapes.py", teacher=teacher, **method(name))
    config = apply_overrides(with_defaults(recipe), ["model.teacher.weights=null"])
    without_priors(config.model.losses)
    model = instantiate(config.model)
    assert list(model.losses.by_name) == [name]
    optimizer = build_optimizer(config, model)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    own = config.train.loss_optimizer
    assert isinstance(optimizer, DistillerOptimizer) == (own is not None) == (name == "icd")


def test_the_published_optimizer_of_icd():
    teacher = ("COCO-Detection/retinanet_R_101_FPN_3x.yaml", "weights.pkl")
    config = with_defaults(
        distill("COCO-Detection/retinanet_R_50_FPN_1x.py", teacher=teacher, **method("icd"))
    )
    own = config.train.loss_optimizer
    assert own.optimizer._target_ is torch.optim.AdamW
    assert (own.optimizer.lr, own.optimizer.weight_decay) == (1e-4, 1e-4)
    schedule = instantiate(own.lr_multiplier)
    assert [schedule(x) for x in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.5, 0.0])
    norm = dict(clip_type="full_model", clip_value=0.01, norm_type=2.0)
    assert own.clip_gradients == dict(enabled=True, **norm)
    assert config.model.losses.icd.priors.names == "coco_2017_train"


def test_every_trained_detector_of_the_zoo_by_its_name():
    names = list(_ModelZooUrls.CONFIG_PATH_TO_URL_SUFFIX)
    assert len(names) > 50
    for name in names:
        config, weights, data = zoo_detector(f"zoo:{name}")
        assert config.rsplit(".", 1)[0] == name and get_checkpoint_url(name).endswith(weights[13:])
        assert weights.startswith("detectron2://") and class_names(data)
    assert zoo_detector(f"zoo:{names[0]}.yaml") == zoo_detector(f"zoo:{names[0]}")


def test_a_teacher_from_the_zoo():
    """Config, weights and channel order as by the two arguments; classes by name, where the data have names."""
    name = "COCO-Detection/retinanet_R_101_FPN_3x"
    config, weights, _ = zoo_detector(f"zoo:{name}")
    base = load("COCO-Detection/retinanet_R_50_FPN_1x.py")
    base.dataloader.train.mapper.image_format = "RGB"
    one, two = (
        OmegaConf.to_container(distill(base, teacher=teacher, **method("icd")).model)
        for teacher in (f"zoo:{name}", (config, weights))
    )
    assert one["teacher"].pop("classes") == "coco_2017_train"
    assert one.pop("classes") == "${dataloader.train.dataset.names}"
    assert one == two and one["teacher"]["image_format"] == "RGB"
    del base.dataloader.train.dataset
    unnamed = distill(base, teacher=f"zoo:{name}", **method("icd")).model
    assert "classes" not in unnamed and "classes" not in unnamed.teacher


@pytest.mark.parametrize("kind", [tiny_faster_rcnn, tiny_retinanet])
def test_classes_of_the_same_names_change_nothing(kind):
    """Losses and gradients are equal to the last bit with and without the teacher's names."""
    names, found = ["cat", "dog", "no cat"], []
    for classes in (None, names):
        torch.manual_seed(0)
        student, teacher = build(kind(), seed=1), build(kind(channels=24), seed=2)
        model = Distiller(
            student=student,
            teacher=Teacher(teacher, None, classes=classes),
            losses=instantiate(method("tar")["losses"]),
            max_iter=4,
            classes=classes,
        ).train()
        with EventStorage(), one_thread():
            losses = model(batch())
            sum(losses.values()).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({**{key: loss.detach() for key, loss in losses.items()}, **gradients})
    assert len(found[0]) > 20 and differences(*found) == []


def _two_sets():
    base = load("baselines/gfl_small_shapes.py")
    base.dataloader.test.dataset.names = ["shapes_val", "shapes_test"]
    return incremental_recipe(base, split="4+4", increment=1)


def _file(name, text):
    """A load of a recipe, or of a yacs config, of this text."""

    def act():
        Path(name).write_text(text)
        return (load if name == "bad.py" else get_detector_config)(name)

    return act


def _tar(*overrides):
    return lambda: load("projects/TAR/configs/tar_shapes.py", list(overrides))


@pytest.mark.parametrize(
    "act, line",
    [
        (lambda: load("nowhere/at_all.py"), "nowhere/at_all.py: no such config"),
        (_file("bad.py", "model = ("), "bad.py: does not load"),
        (_file("bad.py", "import nothing_of_this_name"), "bad.py: does not load"),
        (_file("bad.py", "model = {}"), "no dataloader, optimizer, train; expected model"),
        (lambda: load("COCO-Detection/retinanet_R_50_FPN_1x.yaml"), "a yacs config"),
        (_tar("train.maxiter=3"), "no 'maxiter'"),
        (_tar("modle.a=3"), "no 'modle'"),
        (_tar("train.max_iter"), "no value"),
        (_tar("train.max_iter.a=1"), "train.max_iter has no keys"),
        (_tar("train.max_iter=[3"), "expected"),
        (_file("bad.yaml", "MODEL: [1"), "bad.yaml: does not load"),
        (_file("bad.yaml", "NOT_A_KEY: 1"), "bad.yaml: does not load"),
        (_file("detector.py", "other = dict(a=1)"), "detector.py: defines no model"),
        (lambda: method("magic"), "--distill: magic; expected tar or imitation or icd"),
        (lambda: zoo_detector("zoo:x"), "zoo:x: not in Detectron2's model zoo; expected zoo:COCO"),
        (
            lambda: distill(
                "baselines/faster_rcnn_small_shapes.py",
                teacher="zoo:faster_rcnn_R_101_FPN",
                **method("tar"),
            ),
            "model zoo; expected zoo:COCO-Detection/faster_rcnn_R_101_FPN_3x, or zoo:",
        ),
        (
            lambda: distill(
                "baselines/faster_rcnn_small_shapes.py", teacher="mine.py", **method("tar")
            ),
            "teacher: mine.py; expected (config, weights), zoo:NAME or timm:NAME",
        ),
        (_two_sets, "dataloader.test.dataset.names: 2 data sets; expected one alone"),
    ],
)
def test_what_is_refused(tmp_path, monkeypatch, capsys, act, line):
    monkeypatch.chdir(tmp_path)
    assert line in refusal(act, None, capsys)
