"""Labels from a detector: boxes, classes and files as a data set to train with, from folders and data sets."""

import dataclasses
import errno
import json
import math
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.structures import Boxes, Instances
from omegaconf import OmegaConf
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from d2kd.comparison import detectors, labels
from d2kd.comparison.detectors import (
    LoadedDetector,
    detector_from_config,
    load_data,
    load_detector_for_classes,
)
from d2kd.comparison.labels import (
    UnlabelledImages,
    choose_thresholds,
    given_thresholds,
    read_labels,
    write_labels,
)
from d2kd.config import load
from d2kd.config.saving import save_config
from d2kd.data import check_dataset, coco_dataset, register_voc
from d2kd.engine import Trainer
from d2kd.testing import tiny_mask_rcnn
from d2kd.utils.errors import InputError

from .common import build, command, one_thread, refusal, tiny_faster_rcnn
from .test_voc import NAMES, write_voc
from .tiny_run import distiller, draw_data, recipe

CPU = torch.device("cpu")


@pytest.fixture
def teacher(tmp_path):
    """Config and weights of a detector that knows its classes and finds something in every image."""
    draw_data(tmp_path / "data")
    node = tiny_faster_rcnn()
    node.roi_heads.box_predictor.test_score_thresh = 0.0
    save_config(recipe(tmp_path / "data", tmp_path / "run", node), tmp_path / "config.yaml")
    state = {"model": build(node, 0).state_dict(), "classes": tuple(NAMES)}
    torch.save(state, tmp_path / "teacher.pth")
    return str(tmp_path / "config.yaml"), str(tmp_path / "teacher.pth")


def words_of(teacher, images, output, *more):
    config, weights = teacher
    words = ["--config-file", config, "--weights", weights, "--images", images]
    return [*words, "--output", output, "--device", "cpu", *more]


def label(teacher, images, output, *more):
    command("label")(words_of(teacher, images, output, *more))
    return json.loads(output.read_text())


def scores(content):
    return [one["score"] for one in content["annotations"]]


def test_labels_of_a_data_set_of_the_recipe_train_a_student(teacher, tmp_path, capsys):
    data = tmp_path / "data"
    content = label(teacher, f"tiny_{data}", tmp_path / "labels.json", "--min-score", "0")
    printed = capsys.readouterr().out
    boxes = len(content["annotations"])
    assert f"labels.json: 6 images, {boxes} boxes, 0 images without any" in printed
    assert f"its image_root is {data}" in printed and boxes > 6
    truth = json.loads((data / "data.json").read_text())
    assert content["images"] == truth["images"] and content["categories"] == truth["categories"]
    for one in content["annotations"]:
        x, y, width, height = one["bbox"]
        assert 0 <= x <= x + width <= 64.01 and 0 <= y <= y + height <= 64.01
        assert one["area"] == width * height > 0 and one["iscrowd"] == 0

    name = coco_dataset("labelled", str(tmp_path / "labels.json"), str(data), NAMES)
    config = recipe(data, tmp_path / "student", max_iter=2)
    config.dataloader.train.dataset.names = [config.dataloader.train.dataset.names, name]
    trainer = Trainer(config)
    assert len(trainer.data_loader.dataset) == 12
    trainer.train()


def test_the_score_threshold(teacher, tmp_path):
    every = label(teacher, f"tiny_{tmp_path / 'data'}", tmp_path / "all.json", "--min-score", "0")
    middle = sorted(scores(every))[len(scores(every)) // 2]
    words = ["--min-score", repr(middle)]
    some = label(teacher, f"tiny_{tmp_path / 'data'}", tmp_path / "some.json", *words)
    assert scores(some) == [score for score in scores(every) if score >= middle]
    none = label(teacher, f"tiny_{tmp_path / 'data'}", tmp_path / "none.json", "--min-score", "1")
    assert scores(none) == [] and len(none["images"]) == 6
    name = coco_dataset("without", str(tmp_path / "none.json"), str(tmp_path / "data"))
    assert len(DatasetCatalog.get(name)) == 6


def test_boxes_are_those_of_the_detector(teacher, tmp_path):
    """In pixels of the file, though the detector sees a larger image; on an image that is turned by its metadata."""
    config = load(teacher[0])
    folder = tmp_path / "photos" / "deep"
    folder.mkdir(parents=True)
    turned = Image.new("RGB", (40, 80), "green")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "a.JPG", exif=exif)
    Image.new("RGB", (50, 30), "red").save(tmp_path / "photos" / "b č.png")
    (folder / "notes.txt").write_text("no image")
    content = label(teacher, tmp_path / "photos", tmp_path / "labels.json", "--min-score", "0")
    sizes = [(one["file_name"], one["width"], one["height"]) for one in content["images"]]
    assert sizes == [("b č.png", 50, 30), ("deep/a.JPG", 80, 40)]
    assert [one["name"] for one in content["categories"]] == NAMES
    name = coco_dataset("photos", str(tmp_path / "labels.json"), str(tmp_path / "photos"))
    assert check_dataset(name) == [name]
    detector = build(config.model, 0).eval()
    image = torch.zeros(3, 30, 50, dtype=torch.uint8)
    image[2] = 255
    with torch.no_grad():
        [output] = detector([{"image": image, "height": 30, "width": 50}])
    found = [one for one in content["annotations"] if one["image_id"] == 1]
    assert scores({"annotations": found}) == pytest.approx(output["instances"].scores.tolist())
    corner = [one["bbox"][:2] for one in found]
    expected = output["instances"].pred_boxes.tensor[:, :2].tolist()
    assert [v for box in corner for v in box] == pytest.approx(
        [v for box in expected for v in box], abs=2e-3
    )


def test_classes_and_category_ids_are_those_of_the_data_set(teacher, tmp_path):
    """The detector's second class is the data set's first one; the others are left out."""
    write_voc(tmp_path / "voc", names=["class 1", "other", "third"])
    register_voc("voc", str(tmp_path / "voc"), "train", ["class 1", "other", "third"])
    content = label(teacher, "voc", tmp_path / "labels.json", "--min-score", "0")
    assert [one["name"] for one in content["categories"]] == ["class 1", "other", "third"]
    assert {one["category_id"] for one in content["annotations"]} == {1}
    assert [one["id"] for one in content["images"]] == [1, 2, 3]
    assert content["images"][0]["file_name"] == "train0.jpg"

    given = json.loads((tmp_path / "data" / "data.json").read_text())
    for one in given["categories"]:
        one["id"] *= 7
    for one in given["annotations"]:
        one["category_id"] *= 7
    (tmp_path / "sevens.json").write_text(json.dumps(given))
    coco_dataset("sevens", str(tmp_path / "sevens.json"), str(tmp_path / "data"))
    content = label(teacher, "sevens", tmp_path / "labels.json", "--min-score", "0")
    assert content["categories"] == given["categories"]
    assert {one["category_id"] for one in content["annotations"]} <= {7, 14, 21}


def test_a_data_set_without_class_names_has_those_of_the_detector(teacher, tmp_path):
    files = sorted((tmp_path / "data").glob("*.png"))
    DatasetCatalog.register(
        "bare", lambda: [{"file_name": str(f), "image_id": f.stem} for f in files]
    )
    MetadataCatalog.get("bare")
    content = label(teacher, "bare", tmp_path / "labels.json")
    assert [one["name"] for one in content["categories"]] == NAMES
    assert [one["id"] for one in content["images"]] == [1, 2, 3, 4, 5, 6]


def test_a_file_of_other_images_is_not_read(teacher, tmp_path):
    images = UnlabelledImages.from_dataset(f"tiny_{data_of(teacher)}")
    file = tmp_path / "labels.json"
    assert read_labels(file, images) is None
    steps = []
    ready = load_detector_for_classes(
        detector_from_config("it", *teacher), images.name, images.classes, CPU
    )
    chosen = given_thresholds(NAMES, 0.5)
    content = write_labels(file, ready, images, chosen, lambda *step: steps.append(step))
    assert steps == [(i, 6) for i in range(7)] and read_labels(file, images) == content
    other = UnlabelledImages("other", images.records[:5])
    assert read_labels(file, other) is None


def data_of(teacher):
    node = load(teacher[0]).dataloader.train.dataset.names
    coco_dataset(node.name, node.json_file, node.image_root)
    return node.image_root


@pytest.mark.parametrize(
    "change, line",
    [
        ({"--min-score": "1.5"}, "--min-score: 1.5; expected a score from 0 to 1"),
        ({"--min-score": "nan"}, "--min-score: nan"),
        ({"--min-score": "much"}, "--min-score: much; expected a score from 0 to 1, or CLASS=SC"),
        ({"--min-score": "fish=0.5"}, "--min-score: no class 'fish'; expected of class 0, class"),
        ({"--min-score": ["0.5", "0.6"]}, "--min-score: 0.6 and another; expected one for each"),
        ({"--precision": "0.5"}, "--precision: given without --dataset; expected both"),
        ({"--precision": "0"}, "--precision: 0.0; expected above 0, and at most 1"),
        ({"--config-file": None}, "--config-file: nothing; expected the detector, unless"),
        ({"--classes": "fish"}, "none of the classes; expected some of photos"),
        ({"--student": "dataless.yaml"}, "--student: no class names in its training data"),
        ({"--dataset": "nowhere"}, "data set 'nowhere': not registered"),
        ({"--output": "."}, "--output: . is a folder; expected the file to write"),
        ({"--images": "nowhere"}, "--images: nowhere; expected a folder, or a data set"),
        ({"--images": "empty"}, r"empty: no image; expected at least one; in a folder \*.bmp, "),
        ({"--weights": "absent.pth"}, "absent.pth"),
        ({"--device": "tpu"}, "train.device: tpu"),
        ({"--weights": "nameless.pth", "--images": "photos"}, "3 classes, without names; expecte"),
        ({"--images": "broken"}, "broken: none of 1 images can be read: a.png cannot be decoded"),
    ],
)
def test_what_is_refused(teacher, refuses, tmp_path, change, line):
    (tmp_path / "empty").mkdir()
    for folder, image in (("photos", None), ("broken", b"no image")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (50, 30)).save(tmp_path / folder / "a.png")
        if image:
            (tmp_path / folder / "a.png").write_bytes(image)
    words = words_of(teacher, "photos", tmp_path / "labels.json", "--min-score", "0.5")
    given = dict(zip(words[::2], words[1::2])) | change
    if "--student" in change:
        config = recipe(tmp_path / "data", tmp_path / "run")
        config.dataloader.train.dataset.names = "gone"
        save_config(config, tmp_path / "dataless.yaml")
    if change.get("--weights") == "nameless.pth":
        state = torch.load(teacher[1])
        torch.save({"model": state["model"]}, tmp_path / "nameless.pth")
        config = load(teacher[0])
        config.dataloader.train.dataset.names = "gone"
        save_config(config, tmp_path / "config.yaml")
    words = []
    for key, value in given.items():
        values = value if isinstance(value, list) else [value]
        words += [key, *values] if value is not None else []
    refuses(lambda: command("label")(words), line)


def test_an_interrupted_file_is_not_there(teacher, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise OSError("full")

    monkeypatch.setattr("d2kd.utils.io.os.replace", stop)
    with pytest.raises(OSError, match="full"):
        label(teacher, f"tiny_{tmp_path / 'data'}", tmp_path / "labels.json")
    assert not list(tmp_path.glob("*labels*"))


def run_until(words, number, stop):
    """The command in a process of its own, which is sent a signal while its detector sees an image; its exit code."""

    def work():
        torch.set_num_threads(1)
        calls, detect = [], LoadedDetector.detect_own_classes

        def detect_or_stop(self, batch):
            calls.append(batch)
            if len(calls) == number:
                os.kill(os.getpid(), stop)
            return detect(self, batch)

        LoadedDetector.detect_own_classes = detect_or_stop
        command("label")(words)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(120)
    return process.exitcode


@pytest.mark.parametrize(
    "stop, code, kept",
    [(signal.SIGKILL, -9, 3), (signal.SIGTERM, 143, 4), (signal.SIGINT, 130, 4)],
    ids=lambda value: getattr(value, "name", None),
)
def test_an_interrupted_run_ends_with_the_same_bytes(
    teacher, tmp_path, monkeypatch, capfd, stop, code, kept
):
    monkeypatch.setattr(detectors, "MAX_IMAGES_WITHOUT_WORKER", 2)  # a worker reads the others
    (tmp_path / "data" / "2.png").write_bytes(b"no image")
    file, words = tmp_path / "labels.json", ["--min-score", "0.3", "class 2=0.2"]
    with one_thread():
        whole = label(teacher, tmp_path / "data", tmp_path / "whole.json", *words)
        partial = tmp_path / "labels.json.partial"
        assert run_until(words_of(teacher, tmp_path / "data", file, *words), 4, stop) == code
        assert not file.exists() and len(partial.read_text().splitlines()) == 1 + 1 + kept
        if stop == signal.SIGKILL:
            with open(partial, "a") as torn:
                torn.write('{"size": [64')
        else:
            assert "interrupted; the same command continues" in capfd.readouterr().err
        seen, detect = [], LoadedDetector.detect_own_classes

        def counted(self, batch):
            seen.append(batch)
            return detect(self, batch)

        monkeypatch.setattr(LoadedDetector, "detect_own_classes", counted)
        label(teacher, tmp_path / "data", file, *words)
    assert file.read_bytes() == (tmp_path / "whole.json").read_bytes() and whole["annotations"]
    assert len(seen) == 5 - kept and not partial.exists()


def test_unfinished_labels_of_another_kind_are_not_used(teacher, tmp_path, monkeypatch, capsys):
    data, file = tmp_path / "data", tmp_path / "labels.json"
    whole = label(teacher, data, file, "--min-score", "0.2").copy()

    def interrupted(*words):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stop"):
            rows = labels._rows
            patch.setattr(labels, "_rows", lambda *given: some(rows(*given), 3))
            label(teacher, data, file, *words)
        capsys.readouterr()

    def some(rows, number):
        for _ in range(number):
            yield next(rows)
        raise RuntimeError("stop")

    interrupted("--min-score", "0.1")
    assert label(teacher, data, file, "--min-score", "0.2") == whole
    line = "labels.json.partial: of other labels (minimum scores); all images are labelled anew"
    assert line in capsys.readouterr().out
    interrupted("--min-score", "0.2")
    Image.new("RGB", (64, 64)).save(data / "5.png")
    os.utime(data / "5.png", (1, 1))
    assert label(teacher, data, file, "--min-score", "0.2") != whole
    assert "of other labels (images)" in capsys.readouterr().out
    interrupted("--min-score", "0.2")
    state = torch.load(teacher[1])
    state["model"] = build(load(teacher[0]).model, 1).state_dict()
    torch.save(state, teacher[1])
    label(teacher, data, file, "--min-score", "0.2")
    assert "of other labels (detector's weights_sha256)" in capsys.readouterr().out
    (tmp_path / "labels.json.partial").write_text("no JSON\n")
    label(teacher, data, file, "--min-score", "0.2")
    assert "labelled anew" in capsys.readouterr().out


def test_a_full_disk(teacher, tmp_path, monkeypatch, capfd):
    def full(rows):
        yield next(rows)
        raise OSError(errno.ENOSPC, "No space left on device")

    rows = labels._rows
    monkeypatch.setattr(labels, "_rows", lambda *given: full(rows(*given)))
    words = words_of(teacher, tmp_path / "data", tmp_path / "labels.json")
    line = refusal(command("label"), words, capfd)
    assert "labels.json: cannot be written (No space left on device)" in line
    assert "the same command continues from them" in line


def test_images_that_cannot_be_read_are_named_and_left_out(teacher, tmp_path, capsys):
    data = tmp_path / "data"
    whole = label(teacher, data, tmp_path / "whole.json", "--min-score", "0")
    content = (data / "0.png").read_bytes()
    for i in range(12):
        (data / f"a{i:02d}.png").write_bytes(content[: 40 * (i % 2)])
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(data / "deep.png")
    (data / "a00.png").rename(data / "00.png")  # between images that can be read
    capsys.readouterr()
    file = tmp_path / "labels.json"
    content = label(teacher, data, file, "--min-score", "0")
    printed = capsys.readouterr().out
    assert "left out: 00.png: cannot be decoded (an empty file)" in printed
    assert "left out: 3 more, which are in the file's info" in printed
    assert f"13 of 19 images of {data} cannot be read" in printed
    unreadable = content["info"]["unreadable"]
    assert unreadable[-1] == {"file_name": "deep.png", "reason": "16 bits a pixel"}
    names = [one["file_name"] for one in content["images"]]
    assert names == [one["file_name"] for one in whole["images"]]
    assert [one["id"] for one in content["images"]] == [1, 3, 4, 5, 6, 7]
    assert scores(content) == scores(whole)
    assert read_labels(file, UnlabelledImages.from_folder(data)) == content
    name = coco_dataset("readable", str(file), str(data))
    assert check_dataset(name) == [name] and len(DatasetCatalog.get(name)) == 6


def student_recipe(tmp_path, **aliases):
    """A recipe of classes in another order, one of which the detector has by another name."""
    draw_data(tmp_path / "of_student")
    file = tmp_path / "of_student" / "data.json"
    content = json.loads(file.read_text())
    for one, name in zip(content["categories"], ["Class-2", "unknown", "animal"]):
        one["name"] = name
    file.write_text(json.dumps(content))
    config = recipe(tmp_path / "of_student", tmp_path / "out", distiller())
    config.model.teacher.aliases = aliases
    save_config(config, tmp_path / "student.yaml")
    return tmp_path / "student.yaml"


def test_labels_are_in_the_students_classes(teacher, tmp_path, capsys):
    """Detections of other classes are left out and counted, and aliases join classes whose names differ."""
    whole = label(teacher, tmp_path / "data", tmp_path / "all.json", "--min-score", "0")
    capsys.readouterr()

    def of(content, name):
        [number] = [one["id"] for one in content["categories"] if one["name"] == name]
        found = [one for one in content["annotations"] if one["category_id"] == number]
        return [(one["image_id"], one["bbox"], one["score"]) for one in found]

    words = ["--min-score", "0", "--student", student_recipe(tmp_path, **{"class 0": "animal"})]
    content = label(teacher, tmp_path / "data", tmp_path / "labels.json", *words)
    printed = capsys.readouterr().out
    assert [one["name"] for one in content["categories"]] == ["Class-2", "unknown", "animal"]
    assert of(content, "animal") == of(whole, "class 0") != []
    assert of(content, "Class-2") == of(whole, "class 2") != []
    assert not of(content, "unknown") and len(of(whole, "class 1")) > 0
    assert f"left out: {len(of(whole, 'class 1'))} detections of other classes" in printed
    assert "no labels of unknown: the detector does not know them" in printed
    assert content["info"]["detections_of_other_classes"] == len(of(whole, "class 1"))

    words = [*words, "--classes", "class 2", "class 1"]
    content = label(teacher, tmp_path / "data", tmp_path / "labels.json", *words)
    assert [one["name"] for one in content["categories"]] == ["class 2", "class 1"]
    assert of(content, "class 1") == of(whole, "class 1")

    config = load(str(tmp_path / "student.yaml"))
    config.model.classes = ["class 1"]
    save_config(config, tmp_path / "student.yaml")
    content = label(teacher, tmp_path / "data", tmp_path / "labels.json", *words[:4])
    assert [one["name"] for one in content["categories"]] == ["class 1"]


def test_a_detector_of_the_model_zoo_has_the_names_of_its_training_data():
    detector = detector_from_config("zoo", "COCO-Detection/retinanet_R_50_FPN_1x.yaml", "none.pkl")
    names = detectors._yacs_classes(detector.node)
    assert len(names) == 80 and names[0] == "person"
    assert (
        detectors._yacs_classes(OmegaConf.create({"config": {"DATASETS": {"TRAIN": []}}})) is None
    )


@dataclasses.dataclass
class Scripted(LoadedDetector):
    """It finds every object by its class, with the scores of a list in turn, and boxes where nothing is."""

    found: dict = dataclasses.field(default_factory=dict)

    def detect_own_classes(self, batch):
        boxes, classes, scores = self.found.get(
            os.path.basename(batch[0]["file_name"]), ([], [], [])
        )
        result = Instances((batch[0]["height"], batch[0]["width"]))
        result.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4).float())
        result.pred_classes = torch.tensor(classes).long()
        result.scores = torch.tensor(scores).float()
        return result


def scripted(teacher, tmp_path, right, wrong):
    """A detector with ``right[k]`` scores of correct boxes of class k, and ``wrong[k]`` of others; its data.

    Image i has one object of each class but the last, which has none.
    """
    images, annotations, found = [], [], {}
    (tmp_path / "scripted").mkdir()
    for i in range(4):
        name = f"{i}.png"
        Image.new("RGB", (64, 48)).save(tmp_path / "scripted" / name)
        images.append({"id": i + 1, "file_name": name, "width": 64, "height": 48})
        rows = []
        for k in range(2):
            x = 20 * k
            annotations.append(
                {"id": len(annotations) + 1, "image_id": i + 1, "category_id": k + 1}
                | {"bbox": [x, 5, 15, 15], "area": 225, "iscrowd": 0}
            )
        for k in range(3):
            rows += [([20 * k, 5, 20 * k + 15, 20], k, s) for s in right[k][i::4]]
            rows += [([20 * k, 25, 20 * k + 15, 40], k, s) for s in wrong[k][i::4]]
        found[name] = tuple(map(list, zip(*rows))) or ([], [], [])
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "scripted.json").write_text(json.dumps(content))
    name = coco_dataset(
        f"scripted {tmp_path}", str(tmp_path / "scripted.json"), str(tmp_path / "scripted")
    )
    ready = load_detector_for_classes(detector_from_config("it", *teacher), "it", NAMES, CPU)
    return Scripted(ready.detector, ready.teacher, ready.class_map, found), load_data(name)


RIGHT = [[0.9, 0.8, 0.75, 0.5], [0.3, 0.25], [0.7]]
WRONG = [[0.6, 0.4], [0.8, 0.7], []]


def quiet(*step):
    pass


def test_scores_are_chosen_for_each_class(teacher, tmp_path):
    ready, data = scripted(teacher, tmp_path, RIGHT, WRONG)

    def choose(folder="cache", **options):
        return choose_thresholds(ready, data, tmp_path / folder, quiet, **options)

    # class 0: F1 at 0.5 is 8/9, at 0.75 it is 6/7; class 1: at 0.25 it is 4/8; class 2 has no object.
    best = choose()
    assert best.min_scores == pytest.approx({"class 0": 0.5, "class 1": 0.25, "class 2": None})
    rows = best.rows
    assert [row["objects"] for row in rows] == [4, 4, 0]
    assert [row["precision"] for row in rows] == [0.8, 0.5, None]
    assert [row["f1"] for row in rows] == [0.8889, 0.5, None]
    assert best.chosen["precision"] is None and best.chosen["dataset"] == data.name
    printed = [line.split() for line in str(best).splitlines()]
    assert ["class", "0", "0.500", "0.800", "1.000", "0.889", "4"] in printed
    assert ["class", "2", "-", "-", "-", "-", "0"] in printed
    assert best.left_out == {"class 2": f"no object in {data.name}"}

    precise = choose(precision=0.9)
    expected = {"class 0": 0.75, "class 1": None, "class 2": None}
    assert precise.min_scores == pytest.approx(expected)
    assert "left out: class 1: no score has a precision of 0.9" in str(precise)
    assert choose(precision=0.4).min_scores == pytest.approx(
        {"class 0": 0.4, "class 1": 0.25, "class 2": None}
    )
    given = choose(precision=0.9, default=0.7, given={"class 0": 0.8})
    assert given.min_scores == {"class 0": 0.8, "class 1": 0.7, "class 2": 0.7}
    assert [row["recall"] for row in given.rows] == [0.5, 0, None]
    # Other classes, in another order: those of the data are matched by name.
    names = ["lacking", "CLASS_0"]
    ready.class_map = type(ready.class_map).from_names(names, NAMES)
    assert choose().min_scores == {"lacking": None, "CLASS_0": 0.5}

    file = tmp_path / "labels.json"
    images = dataclasses.replace(UnlabelledImages.from_dataset(data.name), classes=tuple(names))
    content = write_labels(file, ready, images, choose(), quiet)
    assert scores(content) == pytest.approx([0.9, 0.6, 0.8, 0.75, 0.5])
    assert [row["min_score"] for row in content["info"]["thresholds"]] == [None, 0.5]
    assert content["info"]["chosen"]["dataset_sha256"] == data.sha256


def test_a_data_set_on_which_nothing_can_be_chosen(teacher, tmp_path):
    ready, data = scripted(teacher, tmp_path, [[], [], []], WRONG)
    for options, line in (({}, "no detection is right"), ({"precision": 0.5}, "precision of 0.5")):
        with pytest.raises(InputError, match=f"every class is left out, such as class 0: .*{line}"):
            choose_thresholds(ready, data, tmp_path / "cache", quiet, **options)


def test_the_command_chooses_scores(teacher, tmp_path, capsys):
    name = f"tiny_{tmp_path / 'data'}"
    words = ["--dataset", name, "--min-score", "class 0=0.25", "0.35", "--precision", "1"]
    content = label(teacher, tmp_path / "data", tmp_path / "labels.json", *words)
    printed = capsys.readouterr().out
    assert "min. score" in printed and "class 0" in printed
    rows = content["info"]["thresholds"]
    assert rows[0]["min_score"] == 0.25 and rows[0]["precision"] is not None
    for one in content["annotations"]:
        assert one["score"] >= rows[one["category_id"] - 1]["min_score"]
    assert content["info"]["chosen"]["precision"] == 1
    assert (
        content["categories"] == json.loads((tmp_path / "data/data.json").read_text())["categories"]
    )
    assert sorted(file.name for file in tmp_path.glob("labels.json*")) == ["labels.json"]


def test_the_checkpoint_has_the_order_of_classes(teacher, tmp_path):
    """It was trained with it; the data of the recipe may have another one by now."""
    config, weights = teacher
    of = {}
    for order in (NAMES, NAMES[1:] + NAMES[:1]):
        state = torch.load(weights)
        torch.save(state | {"classes": tuple(order)}, weights)
        content = label(teacher, tmp_path / "data", tmp_path / "labels.json", "--min-score", "0")
        names = {one["id"]: one["name"] for one in content["categories"]}
        of[order[0]] = [names[one["category_id"]] for one in content["annotations"]]
    turned = dict(zip(NAMES, NAMES[1:] + NAMES[:1]))
    assert [turned[name] for name in of[NAMES[0]]] == of[NAMES[1]] and len(set(of[NAMES[0]])) > 1


def test_masks_are_those_of_the_detector(teacher, tmp_path):
    """As RLE, which training reads as bitmasks; the area is that of the mask."""
    config, weights = teacher
    node = tiny_mask_rcnn()
    node.roi_heads.box_predictor.test_score_thresh = 0.0
    save_config(recipe(tmp_path / "data", tmp_path / "run", node), tmp_path / "config.yaml")
    detector = build(node, 0)
    torch.nn.init.normal_(detector.roi_heads.mask_head.predictor.weight)
    state = {"model": detector.state_dict(), "classes": tuple(NAMES)}
    torch.save(state, weights)
    content = label(teacher, tmp_path / "data", tmp_path / "labels.json", "--min-score", "0")
    coco = COCO(str(tmp_path / "labels.json"))
    found = detector_from_config("x", config, weights)
    images = UnlabelledImages.from_folder(tmp_path / "data")
    ready = load_detector_for_classes(found, "x", None, CPU)
    seen = 0
    for image, batch in zip(content["images"], detectors.build_loader(found, images.records)):
        pixels = ready.detect(batch).pred_masks.numpy()
        written = coco.imgToAnns[image["id"]]
        kept = [mask for mask in pixels if mask.any()]
        assert len(written) <= len(kept)
        for one in written:
            mask = coco.annToMask(one).astype(bool)
            assert one["area"] == mask.sum() > 0
            assert any((mask == other).all() for other in kept)
        seen += len(written)
    assert seen > 5
    name = coco_dataset(f"masks {tmp_path}", str(tmp_path / "labels.json"), images.root)
    options = {"use_instance_mask": True, "instance_mask_format": "bitmask"}
    mapper = DatasetMapper(is_train=True, augmentations=[], image_format="BGR", **options)
    example = mapper(DatasetCatalog.get(name)[0])["instances"]
    assert example.gt_masks.tensor.flatten(1).any(dim=1).all() and len(example)


def test_pycocotools_reads_the_file(teacher, tmp_path):
    content = label(teacher, tmp_path / "data", tmp_path / "labels.json", "--min-score", "0")
    coco = COCO(str(tmp_path / "labels.json"))
    results = [dict(one) for one in content["annotations"]]
    evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
    evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    assert math.isclose(evaluation.stats[0], 1.0)
    info = content["info"]
    assert len(info["weights_sha256"]) == 64 and info["detector"] == teacher[0]
    assert info["thresholds"][0]["min_score"] == 0 and info["chosen"] is None
