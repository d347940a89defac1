"""What the pages of the documentation show works as it stands there; and their site."""

import functools
import importlib
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

from d2kd.config import (
    Recipe,
    get_config_file,
    get_detector_config,
    is_distiller,
    load,
    with_defaults,
)
from d2kd.config.saving import save_config
from d2kd.data.shapes import CLASSES
from d2kd.modeling import Distiller
from d2kd.structures.class_map import ClassMap, apply_aliases, class_names
from d2kd.study import load_and_plan
from d2kd.testing import check_loss
from d2kd.tools import COMMANDS, main

from . import tiny_run
from .common import ROOT, batch, build, tiny_faster_rcnn
from .pages import BLOCKS, FILES, PAGES, TEXTS, block, commands
from .test_voc import write_voc

# Words of each example, and of each file, that a test here runs; the first two are in test_export.py, the last in
# test_label_onnx.py.
EXAMPLES = [
    *("config.model.student", "onnxruntime", "L(TorchvisionBackbone)", "with_timm_backbone("),
    "timm_teacher(",
    *(
        "L(register_voc)",
        "L(subset)",
        'name="mine_labels"',
        'name="mine_photos"',
        "aliases=",
        "train.loss_optimizer = dict(",
        'Trainer(load("recipe',
    ),
    *("Distiller(student=", "add_d2kd_config", "incremental_recipe(", "with_downscaled_student("),
    *("LinearParamScheduler", "detector_from_config(", "for recipe in (", "set_model_props("),
]
SHOWN_FILES = ["recipe.py", "mine.py", "teacher_and_losses.py", "my_study.py"]
SHOWN_FILES += [
    "my_loss.py",
    "mine_study.py",
    "my_method/loss.py",
    "my_method/recipe.py",
    "my_method/test_loss.py",
]


def test_every_example_has_a_test():
    """One that is new, or that two pages show with different words, has none."""
    named = {text for name, text in FILES.items() if name in SHOWN_FILES}
    for x in BLOCKS:
        count = sum(phrase in x for phrase in EXAMPLES) if not x.startswith("# ") else 0
        assert count == 1 or x.partition("\n")[2] in named, x


def test_the_site(tmp_path):
    """It builds without a warning, with links checked, and needs nothing from other servers."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "api/losses/index.html").read_text()
    assert 'id="d2kd.losses.DistillLoss.normalizer"' in reference
    for path in tmp_path.rglob("*.html"):
        text = path.read_text()
        fetched = re.findall(r"<(?:script|img|link|iframe)\b[^>]*=\"?https?://[^>]*>", text)
        assert not [tag for tag in fetched if "canonical" not in tag], path
        assert not re.findall(r":(?:class|func|meth|mod|attr|data):", text), path


def test_the_example_loss_in_a_package_of_its_own(tmp_path, monkeypatch):
    for name in ("my_method/loss.py", "my_method/recipe.py", "my_method/test_loss.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(FILES[name])
    (tmp_path / "my_method" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("my_method.test_loss").test_properties()
    assert "ChannelDirection" in str(load("my_method/recipe.py").model.losses)
    (tmp_path / "recipe.py").write_text(FILES["recipe.py"])
    config = load(str(tmp_path / "recipe.py"))
    assert is_distiller(config.model) and config.model.teacher.weights == "teacher.pkl"


def test_the_shortest_loss(tmp_path, monkeypatch):
    (tmp_path / "my_loss.py").write_text(FILES["my_loss.py"])
    monkeypatch.syspath_prepend(tmp_path)
    check_loss(importlib.import_module("my_loss").SameMeans, {"faster": tiny_faster_rcnn})


def test_a_study_of_the_recipes_of_init(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_run.draw_data(tmp_path / "data")
    main(["init", "--data", "data/data.json", "--val", "data/data.json", "--output", "mine.py"])
    (tmp_path / "mine_study.py").write_text(FILES["mine_study.py"])
    _, runs = load_and_plan("mine_study.py", [0], [], False)
    names = ["teacher", "alone_seed0", "same_time_seed0", "distilled_seed0"]
    assert sorted(run.name for run in runs) == sorted(names)


def recipe_with(phrase, base="baselines/faster_rcnn_R_50_FPN_1x.py"):
    """A recipe's parts by name, after an example's lines."""
    parts = dict(load(base).items())
    exec(block(phrase), parts)
    return SimpleNamespace(**parts)


def test_a_student_on_a_torchvision_network():
    """The lines make of the ResNet's recipe what the one that is shipped is."""
    made = recipe_with("L(TorchvisionBackbone)")
    shipped = load("baselines/faster_rcnn_mobilenet_v3_FPN_1x.py")
    shipped.model.backbone.bottom_up.name = made.model.backbone.bottom_up.name
    assert made.model == shipped.model
    assert made.dataloader == shipped.dataloader
    assert made.train.init_checkpoint == shipped.train.init_checkpoint == ""


def test_a_student_on_a_timm_network():
    pytest.importorskip("timm")
    made = recipe_with("with_timm_backbone(")
    shipped = load("baselines/faster_rcnn_efficientnet_lite0_FPN_1x.py")
    shipped.model.backbone.bottom_up.freeze_at = 2
    assert made.model == shipped.model and made.dataloader == shipped.dataloader
    assert made.train.init_checkpoint == shipped.train.init_checkpoint == ""


def test_a_teacher_that_is_only_a_backbone():
    pytest.importorskip("timm")
    made = recipe_with("timm_teacher(")
    shipped = load("projects/PKD/configs/pkd_faster_rcnn_R_50_from_dinov2_1x.py")
    assert made.model == shipped.model and made.dataloader == shipped.dataloader


def test_data_in_cocos_format(tmp_path, monkeypatch):
    tiny_run.draw_data(tmp_path / "images")
    for name in ("train.json", "val.json"):
        (tmp_path / name).write_bytes((tmp_path / "images/data.json").read_bytes())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FILES["mine.py"])
    made = load("mine.py")
    for part in ("train", "test"):
        assert len(DatasetCatalog.get(instantiate(made.dataloader[part].dataset.names))) == 6
    assert {"mine_train", "mine_val"} <= set(DatasetCatalog.list())
    assert made.model.student.roi_heads.num_classes == 2
    assert made.model.teacher.classes == "coco_2017_val"


@pytest.mark.parametrize("name, ratio", [("mine_labels", [1, 3]), ("mine_photos", [1, 1])])
def test_several_data_sets(tmp_path, monkeypatch, name, ratio):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MY_DATA", str(tmp_path))
    tiny_run.draw_data(tmp_path / "photos")
    (tmp_path / "photos" / "data.json").rename("labels.json")
    made = recipe_with(f'name="{name}"')
    first, second = made.dataloader.train.dataset.names
    assert first == "coco_2017_train" and instantiate(second) == name
    assert len(DatasetCatalog.get(name)) == 6
    parts = {part: getattr(made, part) for part in Recipe._fields}
    # Its loader is Detectron2's, which knows no ratio.
    assert with_defaults(parts).dataloader.train.ratio == ratio


def test_data_in_vocs_format(tmp_path, monkeypatch):
    images = [[(0, 1, 1, 20, 20)], [(1, 5, 5, 30, 30)]]
    write_voc(tmp_path, {"train": images, "val": images[:1]}, ["cat", "dog"])
    monkeypatch.setenv("MY_DATA", str(tmp_path))
    made = recipe_with("L(register_voc)")
    for part, count in (("train", 2), ("test", 1)):
        assert len(DatasetCatalog.get(instantiate(made.dataloader[part].dataset.names))) == count
    assert {"mine_train", "mine_val"} <= set(DatasetCatalog.list())


def test_a_teacher_of_other_classes():
    made = recipe_with("aliases=")
    teacher = made.model.teacher
    names = apply_aliases(class_names(teacher.classes), teacher.aliases)
    assert ClassMap.from_names(CLASSES, names).pairs and teacher.weights == "teacher.pkl"


def test_a_zoo_teacher_of_other_classes_on_data_in_vocs_format(tmp_path, monkeypatch):
    """Its lines for such data and for such a teacher, put together, train."""
    objects = [[(0, 10, 10, 60, 60), (1, 20, 30, 90, 80)], [(1, 5, 5, 70, 70)]]
    write_voc(tmp_path, {"train": objects, "val": objects[:1]}, ["cat", "dog"])
    plain = "from d2kd.config import load\nglobals().update(load('baselines/faster_rcnn_small_shapes.py'))\n"
    (tmp_path / "plain.py").write_text(plain + block("L(register_voc)"))
    whole = block("aliases=").replace("baselines/faster_rcnn_small_shapes.py", "plain.py")
    (tmp_path / "mine.py").write_text(whole)
    teacher = instantiate(get_detector_config("COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml"))
    arrays = {key: value.numpy() for key, value in teacher.state_dict().items()}
    (tmp_path / "teacher.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "a test"}))
    train = dict(output_dir="out", max_iter=2, device="cpu", log_period=1, eval_period=0)
    words = ["--config-file", "mine.py", *(f"train.{key}={it}" for key, it in train.items())]
    words += ["train.eval_teacher=False", "dataloader.train.total_batch_size=2"]
    words += ["dataloader.train.num_workers=0"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MY_DATA", str(tmp_path))
    main(["train", *words])
    assert "2 of the student's 2 classes" in (tmp_path / "out/log.txt").read_text()
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.json").read_text().splitlines()]
    compared = [row[key] for row in rows if (key := "distill/loss_tar_classification") in row]
    assert compared and all(value > 0 for value in compared), rows


def test_an_optimizer_of_the_losses_own():
    made = recipe_with("train.loss_optimizer = dict(", "projects/ICD/configs/icd_shapes.py")
    parts = {key: vars(made)[key] for key in ("model", "dataloader", "optimizer", "train")}
    assert with_defaults(parts).train.loss_optimizer.clip_gradients.clip_value == 0.01


def test_a_subset():
    made = recipe_with("L(subset)")
    assert instantiate(made.dataloader.train.dataset.names) == "coco_2017_train_10000_images"


def test_losses_side_by_side():
    made = recipe_with("LinearParamScheduler")
    assert list(instantiate(made.losses).by_name) == ["tar", "imitation"]


def test_an_increment_of_a_recipe():
    made = recipe_with("incremental_recipe(", "baselines/gfl_R_50_FPN_1x.py")
    assert made.model.student.num_old_classes == 70 and made.model.teacher.weights == "first_70.pth"


def test_a_student_of_small_images():
    assert recipe_with("with_downscaled_student(").recipe.dataloader.train.mapper.scale == 2


def test_the_recipes_of_init_from_python(tmp_path, monkeypatch):
    """All are trained, each in its folder, and the last one with the teacher that the second one made."""
    monkeypatch.chdir(tmp_path)
    tiny_run.draw_data(tmp_path / "data")
    main(["init", "--data", "data/data.json", "--val", "data/data.json", "--output", "mine.py"])
    fast = [
        "train.max_iter=2",
        "train.eval_period=0",
        "train.device=cpu",
    ]
    fast += ["dataloader.train.total_batch_size=2"]
    fast += ["dataloader.train.num_workers=0", "dataloader.test.num_workers=0"]
    lines = block("for recipe in (").replace("load(recipe)", f"load(recipe, {fast})")
    exec(lines, {})
    assert sorted(path.name for path in Path("output/mine").iterdir()) == [
        "alone",
        "distilled",
        "teacher",
    ]


def test_a_trainer_from_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_run.draw_data(tmp_path / "data")
    made = "without_evaluation(recipe(_here / 'data', _here / 'out'))"
    tiny_run.write_recipe(tmp_path / "recipe.py", made)
    exec(block('Trainer(load("recipe').replace("max_iter=1000", "max_iter=1"), {})
    assert (tmp_path / "out/model_final.pth").is_file()


def test_a_loop_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_run.teacher_weights(tmp_path)
    student = build(tiny_faster_rcnn())
    before = {key: value.clone() for key, value in student.state_dict().items()}
    given = {"student": student, "large_detector": build(tiny_faster_rcnn(channels=24))}
    exec(block("Distiller(student="), given | {"batches": [batch()] * 2})
    saved = torch.load("student.pth")["model"]
    assert before.keys() < saved.keys()  # and what the loss owns
    assert not all(value.equal(saved[key]) for key, value in before.items())


def test_a_yacs_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = FILES["teacher_and_losses.py"].replace('weights="teacher.pkl"', "weights=None")
    (tmp_path / "teacher_and_losses.py").write_text(recipe)
    made = {}
    exec(block("add_d2kd_config"), made)
    made["cfg"].MODEL.DEVICE = "cpu"
    model = build_model(made["cfg"])
    assert isinstance(model, Distiller) and list(model.losses.by_name) == ["tar"]


def test_a_study(tmp_path):
    (tmp_path / "my_study.py").write_text(FILES["my_study.py"])
    _, runs = load_and_plan(tmp_path / "my_study.py", [0], [], False)
    names = ["teacher", "baseline_seed0", "tar_seed0", "baseline_equal_time_seed0"]
    assert sorted(run.name for run in runs) == sorted(names)


def test_a_comparison_from_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_run.draw_data(tmp_path / "data")
    for name, folder, seed in (("teacher.yaml", "", 0), ("mine.py", "output/mine/distilled", 1)):
        config = tiny_run.recipe(tmp_path / "data", tmp_path)
        for part in ("train", "test"):
            config.dataloader[part].dataset.names.name = "mine_val"
        save_config(config, tmp_path / "config.yaml")
        text = (tmp_path / "config.yaml").read_text()
        code = "from d2kd.config import load\nglobals().update(load('config.yaml'))\n"
        (tmp_path / name).write_text(text if name.endswith("yaml") else code)
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        file = f"{folder}/model_final.pth" if folder else "teacher.pkl"
        state = build(tiny_faster_rcnn(), seed).state_dict()
        if folder:
            torch.save({"model": state}, file)
        else:
            arrays = {key: value.numpy() for key, value in state.items()}
            Path(file).write_bytes(pickle.dumps({"model": arrays, "__author__": "a test"}))
    made = {}
    exec(block("detector_from_config("), made)
    assert {"gain", "interval"} <= made["found"].gain("student", "teacher").metrics["AP"].keys()


def test_every_path_they_name_is_there():
    missing, count = [], 0
    for page, text in zip(PAGES, TEXTS):
        links = re.findall(r"\]\(((?!http|#)[^)#]+)", text)
        text = re.sub(r"\[[^]]*\]\([^)]*\)", "", text)
        named = re.findall(r"\b(?:projects|configs|d2kd|tests)/[\w/]+\.py\b", text)
        named += re.findall(r"\bprojects/[\w/]+\.md\b", text)
        recipes = re.findall(r"(?<![\w/])(?:baselines|common)/[\w/]+\.py\b", text)
        files = [page.parent / link for link in links] + [ROOT / name for name in named]
        files += map(get_config_file, recipes)
        missing += [(page.name, file) for file in files if not Path(file).exists()]
        count += len(files)
    assert count > 100 and not missing


def test_every_command_takes_its_words(monkeypatch):
    taken = []
    for name in COMMANDS:
        module = importlib.import_module(f"d2kd.tools.{name.replace('-', '_')}")
        monkeypatch.setattr(module, "run", lambda args: taken.append(args.command))
    for words in commands():
        try:
            main(words)
        except SystemExit as exit:
            pytest.fail(f"d2kd {' '.join(words)}: exit code {exit.code}")
    assert set(taken) == set(COMMANDS) and len(taken) > 50


def test_every_command_they_name_is_there():
    inline = re.findall(r"`(?:\S+=\S+ )?d2kd ([a-z][\w-]*)", "".join(TEXTS))
    assert set(inline) <= set(COMMANDS)


@functools.cache
def runs_of(study):
    return set(LazyConfig.load(str(ROOT / study)).runs)


@pytest.mark.parametrize(
    "project", ["ERD", *(pytest.param(x, marks=pytest.mark.sweep) for x in ("TAR", "ICD"))]
)
def test_every_run_they_name_is_in_its_study(project):
    pattern = rf"d2kd study\s+(projects/{project}/\S+\.py)((?:[^\n`]*\\\n)*[^\n`]*)"
    named = re.findall(pattern, "".join(TEXTS))
    assert len(named) > 3
    for study, options in named:
        _, _, words = options.replace("\\\n", " ").partition("--runs")
        runs = list(itertools.takewhile(lambda word: not word.startswith("-"), words.split()))
        assert set(runs) <= runs_of(study), (study, runs)
