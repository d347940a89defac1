"""Labels from a detector: boxes, classes and files as a data set to train with, from folders and data sets."""

import json

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from d2kd.comparison.detectors import detector_from_config, load_detector_for_classes
from d2kd.comparison.labels import (
    UnlabelledImages,
    given_thresholds,
    read_labels,
    write_labels,
)
from d2kd.config import load
from d2kd.config.saving import save_config
from d2kd.data import check_dataset, coco_dataset, register_voc
from d2kd.engine import Trainer

from .common import build, command, tiny_faster_rcnn
from .test_voc import NAMES, write_voc
from .tiny_run import draw_data, recipe

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
        ({"--output": "."}, "--output: . is a folder; expected the file to write"),
        ({"--images": "nowhere"}, "data set 'nowhere': not registered"),
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
    if change.get("--weights") == "nameless.pth":
        state = torch.load(teacher[1])
        torch.save({"model": state["model"]}, tmp_path / "nameless.pth")
        config = load(teacher[0])
        config.dataloader.train.dataset.names = "gone"
        save_config(config, tmp_path / "config.yaml")
    refuses(lambda: command("label")([word for pair in given.items() for word in pair]), line)


def test_an_interrupted_file_is_not_there(teacher, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise OSError("full")

    monkeypatch.setattr("d2kd.utils.io.os.replace", stop)
    with pytest.raises(OSError, match="full"):
        label(teacher, f"tiny_{tmp_path / 'data'}", tmp_path / "labels.json")
    assert not list(tmp_path.glob("*labels*"))
