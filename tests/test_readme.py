"""What the README shows works as it stands there."""

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
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog

from d2kd.config import get_config_file, get_detector_config, is_distiller, load, with_defaults
from d2kd.data.shapes import CLASSES
from d2kd.structures.class_map import ClassMap, apply_aliases, class_names
from d2kd.tools import COMMANDS

from .common import ROOT
from .test_voc import write_voc
from .tiny_run import draw_data

README = (ROOT / "README.md").read_text()
READMES = [ROOT / "README.md", *sorted(ROOT.glob("projects/*/README.md"))]
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
FILES = dict(re.findall(r"```python\n# (\S+\.py)\n(.*?)```", README, flags=re.DOTALL))


def run(folder, *words):
    environment = {**os.environ, "MY_DATA": str(folder), "PYTHONPATH": str(ROOT)}
    command, options = [sys.executable, *words], dict(capture_output=True, text=True)
    done = subprocess.run(command, cwd=folder, env=environment, **options)
    assert done.returncode == 0, done.stderr
    return done


def test_the_example_loss_in_a_package_of_its_own(tmp_path):
    for name in ("my_method/loss.py", "my_method/recipe.py", "my_method/test_loss.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(FILES[name])
    (tmp_path / "my_method" / "__init__.py").touch()
    code = (
        "from my_method.test_loss import test_properties; test_properties();"
        "from d2kd.config import load; print(load('my_method/recipe.py').model.losses)"
    )
    done = run(tmp_path, "-c", code)
    assert "ChannelDirection" in done.stdout
    (tmp_path / "recipe.py").write_text(FILES["recipe.py"])
    config = load(str(tmp_path / "recipe.py"))
    assert is_distiller(config.model) and config.model.teacher.weights == "teacher.pkl"


def lines(phrase):
    """The one example that has these words."""
    (found,) = (block for block in BLOCKS if phrase in block)
    return found


def recipe_with(phrase, base="baselines/faster_rcnn_R_50_FPN_1x.py"):
    """A recipe's parts by name, after an example's lines."""
    parts = dict(load(base).items())
    exec(lines(phrase), parts)
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


def test_data_in_cocos_format(tmp_path, monkeypatch):
    draw_data(tmp_path / "images")
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


def test_a_zoo_teacher_of_other_classes_on_data_in_vocs_format(tmp_path):
    """Its lines for such data and for such a teacher, put together, train."""
    objects = [[(0, 10, 10, 60, 60), (1, 20, 30, 90, 80)], [(1, 5, 5, 70, 70)]]
    write_voc(tmp_path, {"train": objects, "val": objects[:1]}, ["cat", "dog"])
    plain = "from d2kd.config import load\nglobals().update(load('baselines/faster_rcnn_small_shapes.py'))\n"
    (tmp_path / "plain.py").write_text(plain + lines("L(register_voc)"))
    whole = lines("aliases=").replace("baselines/faster_rcnn_small_shapes.py", "plain.py")
    (tmp_path / "mine.py").write_text(whole)
    teacher = instantiate(get_detector_config("COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml"))
    arrays = {key: value.numpy() for key, value in teacher.state_dict().items()}
    (tmp_path / "teacher.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "a test"}))
    train = dict(output_dir="out", max_iter=2, device="cpu", log_period=1, eval_period=0)
    words = ["--config-file", "mine.py", *(f"train.{key}={it}" for key, it in train.items())]
    words += ["train.eval_teacher=False", "dataloader.train.total_batch_size=2"]
    words += ["dataloader.train.num_workers=0"]
    done = run(tmp_path, "-m", "d2kd", "train", *words)
    assert "2 of the student's 2 classes" in done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.json").read_text().splitlines()]
    compared = [row[key] for row in rows if (key := "distill/loss_tar_classification") in row]
    assert compared and all(value > 0 for value in compared), rows


def test_an_optimizer_of_the_losses_own():
    made = recipe_with("train.loss_optimizer = dict(", "projects/ICD/configs/icd_shapes.py")
    parts = {key: vars(made)[key] for key in ("model", "dataloader", "optimizer", "train")}
    assert with_defaults(parts).train.loss_optimizer.clip_gradients.clip_value == 0.01


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.parent.name)
def test_every_path_it_names_is_there(path):
    text = path.read_text()
    links = re.findall(r"\]\(((?!http|#)[^)#]+)", text)
    text = re.sub(r"\[[^]]*\]\([^)]*\)", "", text)
    named = re.findall(r"\b(?:projects|configs)/[\w/]+\.py", text)
    recipes = re.findall(r"--config-file (baselines/[\w/]+\.py)", text)
    assert len(links) > 5 and len(named) > 5
    files = [path.parent / link for link in links] + [ROOT / name for name in named]
    files += map(get_config_file, recipes)
    assert not [file for file in files if not Path(file).exists()]


def test_every_command_they_name_is_there():
    text = "".join(path.read_text() for path in READMES)
    pattern = r"(?:(?:^    |`)(?:\S+=\S+ )?|-m )d2kd ([a-z][\w-]*)"
    named = re.findall(pattern, text, flags=re.MULTILINE)
    assert set(named) == set(COMMANDS)


@pytest.mark.parametrize("path", READMES[1:], ids=lambda path: path.parent.name)
def test_every_run_it_names_is_in_its_study(path):
    commands = re.findall(r"d2kd study\s+(\S+\.py)((?:[^\n`]*\\\n)*[^\n`]*)", path.read_text())
    assert len(commands) > 3
    runs = {study: set(LazyConfig.load(str(ROOT / study)).runs) for study in dict(commands)}
    for study, options in commands:
        known = runs[study]
        _, _, words = options.replace("\\\n", " ").partition("--runs")
        named = list(itertools.takewhile(lambda word: not word.startswith("-"), words.split()))
        assert set(named) <= known, (study, named)
