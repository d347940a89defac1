"""Overrides of the command line: text of any characters, and values of another type."""

import copy
import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from d2kd.config import apply_overrides, load, with_defaults
from d2kd.engine import Trainer
from d2kd.tools.compare import split_files
from d2kd.utils.io import check_output_folder

from .common import command
from .tiny_run import distiller, draw_data, recipe, teacher_weights, write_recipe


@pytest.fixture(scope="module")
def loaded():
    return load("projects/TAR/configs/tar_shapes.py")


@pytest.fixture
def plain(loaded):
    return copy.deepcopy(loaded)


def given(config, key, text):
    config = with_defaults(apply_overrides(config, [f"{key}={text}"]))
    return OmegaConf.select(config, key)


TEXTS = ["Übung", "日本", "a=b", "x=y=z", "run(1)", "a b", "a,b", "a#b", "50%", "a;b", "a:b", "$x"]
TEXTS += ["C:\\runs\\x", "a\\,b", "it's", "'it's'", "(a)", "[a", "[a,b]", "{a:1}", "glob(*)", "@a"]
TEXTS += [
    "a&b",
    "a^b",
    "a!b",
    "a`b",
    "1e3",
    "01",
    "2024_01_02",
    "7",
    "nan",
    "-x",
    "a\nb",
    "🙂",
    "…",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_taken_as_it_is(plain, text):
    taken = dict.fromkeys(("train.output_dir", "train.init_checkpoint"), text)
    if text[0] not in "[{" and "," not in text and text not in ("1e3", "7", "nan", "2024_01_02"):
        taken["train.user.note"] = text.strip()  # of any type
    config = with_defaults(apply_overrides(plain, [f"{key}={text}" for key in taken]))
    assert {key: OmegaConf.select(config, key) for key in taken} == taken


def test_quotes_and_the_home_folder(plain, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for text, expected in {
        "'a,b'": "a,b",
        '"a b"': "a b",
        " a ": "a",
        "~/runs": "/home/me/runs",
        "~": "/home/me",
        "a/~": "a/~",
        "${train.max_iter}": str(plain.train.max_iter),
    }.items():
        assert given(plain, "train.output_dir", text) == expected


@pytest.mark.parametrize(
    "name",
    ["Übung, a=b", *(pytest.param(x, marks=pytest.mark.sweep) for x in ("run(1) #50%", "C:\\x"))],
)
def test_a_run_in_a_folder_of_such_a_name(tmp_path, name, monkeypatch):
    """It is trained, resumed from its own config, and evaluated."""
    draw_data(tmp_path / "data")
    file = write_recipe(tmp_path / "plain.py", "recipe(_here / 'data', _here / 'out', max_iter=1)")
    folder = tmp_path / name
    command("train")(["--config-file", file, f"train.output_dir={folder}"])
    assert json.loads((folder / "run.json").read_text())["rows"][0]["finished"]
    command("train")(["--config-file", folder / "config.yaml", "--resume", "train.max_iter=2"])
    command("train")(["--config-file", folder / "config.yaml", "--eval-only"])
    assert (folder / "evaluation/results.json").is_file()
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("HOME", str(tmp_path))
    start = f"train.init_checkpoint={folder / 'model_final.pth'}"
    command("train")(["--config-file", file, start, "train.output_dir=~/x"])
    assert (tmp_path / "x/model_final.pth").is_file()


TYPES = [
    ("optimizer.lr", "'0.001'", 0.001),
    ("optimizer.lr", "1e-3", 0.001),
    ("optimizer.lr", "1", 1),
    ("optimizer.lr", "${train.max_iter}", 1500),
    ("train.max_iter", "1e3", 1000),
    ("train.max_iter", "1000.0", 1000),
    ("train.max_iter", "'7'", 7),
    ("train.max_iter", "1_000", 1000),
    ("train.seed", "null", None),
    ("train.amp.enabled", "yes", True),
    ("train.amp.enabled", "off", False),
    ("train.amp.enabled", "1", True),
    ("train.init_checkpoint", "null", None),
    ("train.best_checkpoint", "", ""),
    ("train.clip_gradients.clip_value", "1", 1.0),
    ("dataloader.train.total_batch_size", "4.0", 4),
    ("dataloader.train.aspect_ratio_grouping", "no", False),  # which the recipe has not
    ("dataloader.train.dataset.names", "Übung", "Übung"),
    ("dataloader.train.dataset.names", "[a,b]", ["a", "b"]),
    ("model.losses.tar.feature_weight", "1", 1),
    ("model.teacher.weights", "Übung, a=b.pth", "Übung, a=b.pth"),
    ("model.teacher.weights", "null", None),
]


@pytest.mark.parametrize("key, text, expected", TYPES)
def test_values_of_another_type(plain, key, text, expected):
    expected = plain.train.max_iter if text.startswith("${") else expected
    value = given(plain, key, text)
    assert value == expected and type(value) in (type(expected), type(OmegaConf.create([])))


def test_a_list_takes_the_place_of_a_node(tmp_path):
    config = recipe(tmp_path, tmp_path)
    assert given(config, "dataloader.train.dataset.names", "[a,b]") == ["a", "b"]


REFUSED = [
    ("optimizer.lr=fast", "optimizer.lr: fast; expected a number"),
    ("optimizer.lr=", "optimizer.lr: nothing; expected a number"),
    ("optimizer.lr=null", "optimizer.lr: null; expected a number"),
    ("optimizer.lr=true", "optimizer.lr: True; expected a number"),
    ("optimizer.lr=nan", "optimizer.lr: nan; expected a number"),
    ("optimizer.lr=1e400", "optimizer.lr: inf; expected a number"),
    ("optimizer.lr=[1]", r"optimizer.lr: \[1\]; expected a number"),
    ("optimizer.lr=0.1,0.2", "optimizer.lr: 0.1,0.2; expected a number"),
    ("optimizer.lr=run(1)", r"optimizer.lr: run\(1\); expected a number"),
    ("dataloader.train.aspect_ratio_grouping=maybe", "grouping: maybe; expected true or false"),
    ("train.max_iter=yes", "train.max_iter: yes; expected an integer"),
    ("train.max_iter=1.5", "train.max_iter: 1.5; expected an integer"),
    ("train.max_iter=10k", "train.max_iter: 10k; expected an integer"),
    ("train.amp.enabled=maybe", "train.amp.enabled: maybe; expected true or false"),
    ("train.amp.enabled=2", "train.amp.enabled: 2; expected true or false"),
    ("train.output_dir=", "train.output_dir: nothing; expected a folder"),
    ("train.output_dir=null", "train.output_dir: None; expected a string"),
    ("train.output_dir=a${b", "train.output_dir: .*; expected an override such as"),
    ("dataloader.train.total_batch_size=four", "total_batch_size: four; expected an integer"),
    ("dataloader.train.total_batch_size=null", "total_batch_size: null; expected an integer"),
    ("dataloader.train.mapper=a,b", "mapper: a,b; expected one value, or a list such as"),
    ("model.teacher.scale=x", "model.teacher.scale: x; expected an integer"),
    ("~train.seed", "train.seed: deletion is not supported; expected"),
]


@pytest.mark.parametrize("override, line", REFUSED)
def test_values_that_mean_nothing(plain, refuses, override, line):
    refuses(lambda: apply_overrides(plain, [override]), line)


@pytest.mark.parametrize(
    "override, line",
    [
        ("train.max_iter=1e22", "train.max_iter: 1.*; expected an integer below 2147483648"),
        ("train.output_dir=s3://bucket/run", "train.output_dir: s3://bucket/run; expected a local"),
        ("train.output_dir=a\0b", "train.output_dir: .* is no valid name .*null character"),
        ("train.device=mps", "train.device: mps; expected auto, cpu or cuda"),
        ("dataloader.train.dataset.names=7", "data set '7': not registered"),
        ("dataloader.train.dataset.names=null", "dataset.names: none; expected a data set's name"),
        ("dataloader.test.dataset.names=[]", "dataloader.test.dataset.names: none; expected"),
        ("dataloader.train.mapper.image_format=rgb", "image_format: rgb; expected BGR or RGB"),
        ("dataloader.evaluator.tasks=bbox", "evaluator.tasks: bbox; expected a list of bbox, segm"),
        ("dataloader.evaluator.tasks=[box]", r"evaluator.tasks: \['box'\]; expected a list of"),
        ("model.losses=null", r"model.losses: null; expected a node such as L\(DistillLosses\)"),
        ("model.teacher.detector=null", r"teacher.detector: null; .*L\(GeneralizedRCNN\)"),
        ("model.teacher.input_format=XYZ", "input_format: XYZ, of images in BGR; expected BGR and"),
    ],
)
def test_values_that_a_run_cannot_use(tmp_path, refuses, override, line):
    draw_data(tmp_path / "data")
    config = recipe(tmp_path / "data", tmp_path / "out", distiller(teacher_weights(tmp_path)))
    refuses(lambda: Trainer(apply_overrides(config, [override])), line)


def test_text_where_a_node_takes_a_number(plain, refuses, tmp_path):
    """In a recipe, too, such as 1e-3 in YAML, which is text."""
    plain.optimizer.lr = "1e-3"
    refuses(lambda: with_defaults(plain), "optimizer.lr: '1e-3'; expected a number")
    draw_data(tmp_path / "data")
    config = recipe(tmp_path / "data", tmp_path / "out")
    config.dataloader.train.total_batch_size = 2.5
    refuses(lambda: Trainer(config), "total_batch_size: 2.5; expected an integer")


@pytest.mark.parametrize(
    "name, line",
    [
        ("a_file", "a_file is a file; expected a folder"),
        ("a_file/within/it", "a_file is a file; expected a folder"),
        ("x" * 300, "is no valid name"),
        ("a\udcffb", "is no valid name"),
    ],
)
def test_output_folders_that_cannot_be(tmp_path, refuses, name, line):
    draw_data(tmp_path / "data")
    (tmp_path / "a_file").write_text("")
    refuses(
        lambda: Trainer(recipe(tmp_path / "data", tmp_path / name)), f"train.output_dir: .*{line}"
    )


def test_an_output_folder_that_cannot_be_written(tmp_path, refuses, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    line = "train.output_dir: .* cannot be written; expected a folder that can"
    refuses(lambda: check_output_folder(Path(tmp_path, "a", "b")), line)


@pytest.mark.parametrize(
    "words",
    [
        ["export", "--config-file", "x.py", "--weights", "x.pth", "--format", "torchscript"],
        ["compare", "--detector", "a=x.py,x.pth"],
        ["visualize", "--config-file", "x.py", "--dataset", "x"],
    ],
    ids=lambda words: words[0],
)
def test_every_output_is_a_folder(tmp_path, refuses, words):
    (tmp_path / "a_file").write_text("")
    line = "--output: .*a_file is a file; expected a folder"
    refuses(lambda: command(words[0])([*words[1:], "--output", tmp_path / "a_file/in"]), line)


def test_detectors_of_files_with_commas(tmp_path, monkeypatch):
    """Where the files tell how to split; otherwise at each comma."""
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.py", "w,x.pth", "r.json", "plain.py"):
        Path(name).write_text("")
    for text, expected in {
        "plain.py,w,x.pth": ["plain.py", "w,x.pth"],
        "a,b.py,w,x.pth": ["a,b.py", "w,x.pth"],
        "a,b.py,w,x.pth,r.json": ["a,b.py", "w,x.pth", "r.json"],
        "zoo.yaml,model.pkl": ["zoo.yaml", "model.pkl"],
        "plain.py": ["plain.py"],
    }.items():
        assert split_files(text) == expected
