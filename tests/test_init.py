"""``d2kd init``: numbers that follow the data, and one file of three recipes that train."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from detectron2.config import instantiate
from detectron2.structures import BoxMode

from d2kd.config import is_distiller, load, student_node
from d2kd.config.proposal import SIZE_RANGE, propose
from d2kd.data import check_dataset
from d2kd.data.sizes import DataSizes
from d2kd.doctor import sanity_check
from d2kd.engine import Trainer

from .common import CLASSES, command
from .test_voc import NAMES, write_voc
from .tiny_run import draw_data

init = command("init")
ZOO_NAME = "zoo:COCO-Detection/faster_rcnn_R_101_FPN_3x"
FAST = ["train.max_iter=2", "train.device=cpu", "train.eval_teacher=False", "train.log_period=1"]
FAST += ["dataloader.train.num_workers=0", "dataloader.test.num_workers=0"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two COCO-style sets with their images beside the files."""
    draw_data(tmp_path / "train")
    draw_data(tmp_path / "val", objects=(2, 1))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def init_coco(*words, output="mine.py"):
    init(["--data", "train/data.json", "--val", "val/data.json", "--output", output, *words])


def sizes_of(side, boxes, images=40):
    """Of wide images with this longer side, and boxes spread over them."""
    boxes = np.asarray(boxes, dtype=float)
    size = np.tile([side, 0.75 * side], (images, 1))
    return DataSizes(size, boxes, np.arange(len(boxes)) % images)


def test_sizes_of_records():
    box = dict(bbox_mode=BoxMode.XYXY_ABS, category_id=0)
    records = [
        dict(width=200, height=100, annotations=[dict(box, bbox=[0, 0, 20, 10])]),
        dict(width=10, height=10, annotations=[]),
        dict(width=100, height=400, annotations=[dict(box, bbox=[5, 5, 15, 45], iscrowd=0)]),
        dict(annotations=[dict(box, bbox=[0, 0, 9, 9])]),
    ]
    records[0]["annotations"] += [
        dict(box, bbox=[0, 0, 20, 10], iscrowd=1),
        dict(box, bbox=[3, 3, 3, 9]),
    ]
    sizes = DataSizes.of(records)
    assert sizes.images.tolist() == [[200, 100], [10, 10], [100, 400]]
    assert sizes.boxes.tolist() == [[20, 10], [10, 40]] and sizes.image_of.tolist() == [0, 2]
    # The shorter side becomes 50, unless the longer one then exceeds 100.
    assert sizes.resized(50, 100).tolist() == [[10, 5], [2.5, 10]]


@pytest.mark.parametrize("gpu", [False, True])
def test_numbers_follow_the_data(gpu):
    random = np.random.RandomState(0)
    boxes = random.uniform(20, 200, (500, 2))
    before = None
    for factor in (4, 2, 1, 0.25):  # ever smaller objects need ever larger images
        found = propose(sizes_of(1000, boxes * factor), gpu)
        shorter, longer = found.image_size
        assert shorter / longer == pytest.approx(0.75, abs=0.05)
        assert SIZE_RANGE[gpu][0] <= longer <= SIZE_RANGE[gpu][1]
        assert before is None or longer >= before
        before = longer
        sides = np.sqrt(sizes_of(1000, boxes * factor).resized(*found.image_size).prod(axis=1))
        anchors = found.anchor_sizes
        assert anchors[0] >= 4 and anchors[-1] * 1.5 > np.percentile(sides, 95)
        assert found.batch_size <= 40 and found.iterations >= 1000
    assert propose(sizes_of(64, [[9, 9]]), gpu).image_size == (48, 64)  # never enlarged


def test_shapes_give_aspect_ratios():
    square = [[50, 50 + k] for k in range(-9, 10)]
    assert propose(sizes_of(500, square), False).aspect_ratios == [1.0]
    wide = [[90, 30]] * 5
    assert propose(sizes_of(500, [*square, *wide]), False).aspect_ratios == [0.3, 1.0]
    both = propose(sizes_of(500, [*wide, *([30, 90],) * 5, *square[:3]]), False).aspect_ratios
    assert both == [0.3, 1.0, 3.0]
    assert propose(sizes_of(500, [[400, 2]]), False).aspect_ratios == [0.1, 1.0]


def test_schedule_and_batch_follow_the_number_of_images():
    few, many = (propose(sizes_of(500, [[40, 40]], images), False) for images in (2, 10**6))
    assert (few.batch_size, few.iterations) == (2, 1000) and many.iterations == 20000
    assert propose(sizes_of(500, [[40, 40]], 400), False).iterations == 3000


def test_one_file_trains_student_and_teacher(folder, capsys):
    init_coco()
    said = capsys.readouterr().out
    assert "6 images, 7 objects" in said
    teacher, alone, distilled = (load(x) for x in ("mine.py:teacher", "mine.py:alone", "mine.py"))
    assert is_distiller(distilled.model) and not is_distiller(alone.model)
    assert set(distilled) == {"model", "dataloader", "optimizer", "lr_multiplier", "train"}
    assert student_node(distilled.model) == alone.model
    assert alone.model.backbone.bottom_up.name != teacher.model.backbone.bottom_up.name
    folders = {config.train.output_dir for config in (teacher, alone, distilled)}
    assert folders == {f"output/mine/{name}" for name in ("teacher", "alone", "distilled")}
    # After two steps nothing may be detected, and no state is the best.
    weights = "model.teacher.weights=output/mine/teacher/model_final.pth"
    assert distilled.model.teacher.weights == "output/mine/teacher/model_best.pth"
    for name, more in (("mine.py:teacher", []), ("mine.py", [weights])):
        trainer = Trainer(load(name, FAST + more))
        findings = sanity_check(trainer.cfg, trainer.model)
        assert not [finding for finding in findings if finding.state != "ok"], findings
        trainer.train()
        assert Path(trainer.cfg.train.output_dir, "model_final.pth").is_file()


def printed_commands(said):
    """The words of each command, without ``d2kd``."""
    lines = said.split("\n\n", 1)[1].replace("\\\n", "").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.strip().startswith("d2kd ")]


def test_commands_to_run_next(folder, capsys):
    init_coco()
    commands = printed_commands(capsys.readouterr().out)
    assert [words[0] for words in commands] == ["doctor", "train", "train", "train", "compare"]
    trained = [words[-1] for words in commands if words[0] == "train"]
    assert trained == ["mine.py:alone", "mine.py:teacher", "mine.py"]
    detectors = [word.split("=", 1)[1] for word in commands[-1] if "=" in word]
    for detector in detectors:
        config, weights = detector.split(",")
        assert weights == f"{load(config).train.output_dir}/model_best.pth"
    assert "mine_val" in commands[-1] and len(detectors) == 3


def test_a_trained_teacher(folder, capsys):
    init_coco(output="first.py")
    capsys.readouterr()
    Path("teacher.pth").touch()
    init_coco("--teacher", "first.py:teacher", "teacher.pth", output="given.py")
    commands = printed_commands(capsys.readouterr().out)
    assert [words[-1] for words in commands if words[0] == "train"] == [
        "given.py:alone",
        "given.py",
    ]
    assert f"teacher={folder}/first.py:teacher,{folder}/teacher.pth" in commands[-1]
    config = load("given.py")
    assert config.model.teacher.weights == str(folder / "teacher.pth")
    assert config.model.teacher.detector == load("first.py:teacher").model
    init_coco("--teacher", ZOO_NAME, output="zoo.py")
    commands = printed_commands(capsys.readouterr().out)
    assert len([word for word in commands[-1] if word.startswith(("alone=", "distilled="))]) == 2
    assert 'teacher="zoo:COCO-Detection/faster_rcnn_R_101_FPN_3x"' in Path("zoo.py").read_text()


def test_a_teacher_of_timm(folder, capsys):
    """With a method between features, since it predicts nothing."""
    pytest.importorskip("timm")
    init_coco("--teacher", "timm:test_vit", output="timm.py")
    commands = printed_commands(capsys.readouterr().out)
    assert not any("teacher" in word for words in commands for word in words)
    model = load("timm.py").model
    assert model.teacher.detector.backbone.name == "test_vit" and "pkd" in model.losses


def test_voc_data(tmp_path, monkeypatch, capsys):
    write_voc(tmp_path / 'a "voc" folder')
    monkeypatch.chdir(tmp_path)
    init(["--data", 'a "voc" folder', "--output", "mine.py"])
    assert "3 images, 3 objects, 3 classes" in capsys.readouterr().out
    config = load("mine.py:alone")
    for part, split in ((config.dataloader.train, "train"), (config.dataloader.test, "val")):
        assert instantiate(part.dataset.names) == f"mine_{split}"
        assert part.dataset.names.classes == NAMES
    assert config.model.roi_heads.num_classes == CLASSES


def test_images_of_absolute_names_and_a_flat_voc_folder(folder, tmp_path, capsys):
    content = json.loads(Path("train/data.json").read_text())
    for one in content["images"]:
        one["file_name"] = str(folder / "train" / one["file_name"])
    Path("train/data.json").write_text(json.dumps(content), encoding="utf-16")
    init_coco()
    check_dataset(load("mine.py:alone").dataloader.train.dataset.names)
    root = write_voc(folder / "voc")
    for split in ("train", "val"):
        Path("flat", split).mkdir(parents=True)
        for file in (*root.glob(f"*/{split}*.xml"), *root.glob(f"*/{split}*.jpg")):
            file.rename(Path("flat", split, file.name))
    init(["--data", "flat", "--output", "flat.py"])
    check_dataset(load("flat.py:alone").dataloader.train.dataset.names)


def test_data_at_the_path_of_a_variable(folder, monkeypatch):
    monkeypatch.setenv("MY_DATA", str(folder))
    words = ["--data", "$MY_DATA/train/data.json", "--val", "$MY_DATA/val/data.json"]
    init([*words, "--output", "mine.py"])
    names = load("mine.py:alone").dataloader.test.dataset.names
    assert (names.json_file, names.image_root) == ("$MY_DATA/val/data.json", "$MY_DATA/val")


def test_without_timm(folder, monkeypatch):
    monkeypatch.setattr("d2kd.tools.init.find_spec", lambda name: None)
    init_coco()
    config = load("mine.py")
    bottom_up = config.model.student.backbone.bottom_up
    assert bottom_up.weights == "DEFAULT" and set(config) == set(load("mine.py:alone"))
    bottom_up.weights = config.model.teacher.detector.backbone.bottom_up.weights = None
    config.model.teacher.weights = None
    assert config.dataloader.train.mapper.image_format == "RGB"
    assert instantiate(config.model).student.input_format == "RGB"


def test_the_file_is_formatted(folder):
    for timm, output in ((True, "mine.py"), (False, "other.py")):
        with pytest.MonkeyPatch.context() as patch:
            if not timm:
                patch.setattr("d2kd.tools.init.find_spec", lambda name: None)
            init_coco("--teacher", ZOO_NAME, output=output) if timm else init_coco(output=output)
    words = ["ruff", "format", "--isolated", "--line-length", "100", "--diff"]
    done = subprocess.run(
        [sys.executable, "-m", *words, "mine.py", "other.py"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_what_is_refused(folder, refuses):
    Path("old.py").touch()
    no_objects = json.loads(Path("train/data.json").read_text()) | {"annotations": []}
    Path("train/empty.json").write_text(json.dumps(no_objects))
    Path("far").mkdir()
    Path("far/data.json").write_text(Path("val/data.json").read_text())
    other = json.loads(Path("val/data.json").read_text())
    other["categories"][0]["name"] = "other"
    Path("val/other.json").write_text(json.dumps(other))
    write_voc(folder / "voc")
    write_voc(folder / "no_objects", splits={"train": [[]], "val": [[]]})
    data, val = ["--data", "train/data.json"], ["--val", "val/data.json"]
    out = ["--output", "new.py"]
    for words, line in (
        ([*data, *val, "--output", "mine.yaml"], "--output: mine.yaml; expected a Python file"),
        ([*data, *val, "--output", "a b.py"], "--output: a b.py; expected a Python file"),
        ([*data, *val, "--output", "old.py"], "--output: old.py exists; expected a new file"),
        ([*data, *val, "--output", "no/new.py"], "--output: no folder no"),
        ([*data, *out], "--val: nothing"),
        ([*data, "--val", "far/data.json", *out], "far/data.json: 0.png is not beside it"),
        (
            [*data, "--val", "val/other.json", *out],
            "val/other.json: no class 'class 0'; classes not in the list: 'other'",
        ),
        ([*data, "--val", "nowhere.json", *out], "nowhere.json: no such file"),
        (["--data", "train/empty.json", *val, *out], "empty.json: no object"),
        ([*data, *val, *out, "--teacher", "x"], "--teacher: x; expected CONFIG WEIGHTS"),
        (
            [*data, *val, *out, "--teacher", "zoo:x"],
            "zoo:x: not in Detectron2's model zoo; expected zoo:",
        ),
        ([*data, *val, *out, "--teacher", "timm:x"], "x: timm has no such classifier"),
        (["--data", "voc", "--images", "x", *out], "--images: given for a VOC folder"),
        (["--data", "no_objects", *out], "no object in any .xml"),
        (["--data", "voc", "--classes", "class 0", *out], "expected one of class 0"),
    ):
        refuses(lambda words=words: init(words), line)
