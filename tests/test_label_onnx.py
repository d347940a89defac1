"""Labels by detectors in ONNX files: of this package, and of other programs in the same form."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.data import transforms as T
from PIL import Image

from d2kd.config import load, with_downscaled_student
from d2kd.config.saving import save_config
from d2kd.export import export_detector, prepare_for_export
from d2kd.export.table import export_metadata

from .common import CLASSES, build, command, refusal, tiny_faster_rcnn
from .pages import block
from .tiny_run import draw_data, recipe

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
NAMES = [f"class {k}" for k in range(CLASSES)]
ABOUT = {"classes": json.dumps(NAMES), "image_format": "BGR"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A recipe that resizes, weights, and the ONNX file of both."""
    folder = tmp_path_factory.mktemp("exported")
    draw_data(folder / "data")
    node = tiny_faster_rcnn()
    node.roi_heads.box_predictor.test_score_thresh = 0.1
    config = recipe(folder / "data", folder / "run", node)
    resize = L(T.ResizeShortestEdge)(short_edge_length=80, max_size=120)
    config.dataloader.test.mapper.augmentations = [resize]
    detector = build(node, 0)
    state = {"model": detector.state_dict(), "classes": tuple(NAMES)}
    torch.save(state, folder / "model.pth")
    save_config(config, folder / "config.yaml")
    config = load(str(folder / "config.yaml"))
    about = export_metadata(config, detector, str(folder / "model.pth"))
    assert json.loads(about["resize"]) == [80, 120]
    export_detector(prepare_for_export(detector), folder / "model.onnx", about)
    Image.fromarray(np.random.RandomState(1).randint(0, 256, (40, 90, 3), np.uint8)).save(
        folder / "data" / "wide.png"
    )
    return folder


def label(images, output, *words):
    words = ["--images", images, "--output", output, "--device", "cpu", *words]
    command("label")([*words, "--min-score", "0.2"])
    return json.loads(output.read_text())


def test_a_file_labels_as_its_detector_does(exported, tmp_path):
    detector = ["--config-file", exported / "config.yaml", "--weights", exported / "model.pth"]
    expected = label(exported / "data", tmp_path / "a.json", *detector)
    found = label(exported / "data", tmp_path / "b.json", "--weights", exported / "model.onnx")
    assert found["images"] == expected["images"] and found["categories"] == expected["categories"]
    assert len(found["annotations"]) == len(expected["annotations"]) > 0
    for one, other in zip(found["annotations"], expected["annotations"]):
        assert one["bbox"] == pytest.approx(other["bbox"], abs=0.1)
        assert one["score"] == pytest.approx(other["score"], abs=1e-3)
        assert (one["image_id"], one["category_id"]) == (other["image_id"], other["category_id"])
    words = ["--weights", exported / "model.onnx", "--config-file", exported / "config.yaml"]
    by_recipe = label(exported / "data", tmp_path / "c.json", *words)
    assert by_recipe["annotations"] == found["annotations"]


def graph(
    path,
    size=(3, "height", "width"),
    about=ABOUT,
    outputs=("boxes", "scores", "classes"),
    shape=(1, 4),
    label=1,
):
    """A detector of one object, in the upper left of 64 x 48 pixels; its score is the maximum of the first channel."""
    helper, tensor = onnx.helper, onnx.TensorProto
    box = helper.make_tensor("box", tensor.FLOAT, shape, [0.0, 0.0, 32.0, 24.0][: np.prod(shape)])
    number = helper.make_tensor("number", tensor.INT64, [1], [label])
    nodes = [
        helper.make_node("Constant", [], ["boxes"], value=box),
        helper.make_node("Constant", [], ["classes"], value=number),
        helper.make_node("ReduceMax", ["image"], ["all"], keepdims=0),
        helper.make_node("Constant", [], ["full"], value_float=255.0),
        helper.make_node("Constant", [], ["axes"], value_ints=[0]),
        helper.make_node("Constant", [], ["first"], value_ints=[0]),
        helper.make_node("Gather", ["image", "first"], ["channel"], axis=0),
        helper.make_node("ReduceMax", ["channel"], ["pixel"], keepdims=0),
        helper.make_node("Div", ["pixel", "full"], ["share"]),
        helper.make_node("Unsqueeze", ["share", "axes"], ["scores"]),
    ]
    image = helper.make_tensor_value_info("image", tensor.FLOAT, size)
    kinds = {"classes": tensor.INT64}
    outputs = [
        helper.make_tensor_value_info(name, kinds.get(name, tensor.FLOAT), None) for name in outputs
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "it", [image], outputs),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    helper.set_model_props(model, about)
    onnx.save(model, path)
    return path


@pytest.fixture
def photos(tmp_path):
    """One image, 96 pixels high and twice as wide, in red."""
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (192, 96), (255, 102, 0)).save(tmp_path / "photos" / "red.png")
    return tmp_path / "photos"


def test_an_image_is_read_as_the_file_says(photos, tmp_path):
    """Its first channel, and boxes in pixels of the photograph though the file takes images of one size."""
    file, output = tmp_path / "it.onnx", tmp_path / "labels.json"
    words = ["--weights", graph(file, (3, 48, 64), about=ABOUT | {"image_format": "RGB"})]
    [one] = label(photos, output, *words)["annotations"]
    assert one["bbox"] == [0, 0, 96, 48] and one["score"] == 1 and one["category_id"] == 2
    graph(file, (3, 48, 64))  # blue comes first
    assert label(photos, output, *words)["annotations"] == []
    graph(file, about=ABOUT | {"image_format": "RGB", "resize": "[48, 1000]"})
    [one] = label(photos, output, *words)["annotations"]
    assert one["bbox"] == [0, 0, 64, 48]
    # A recipe's mapper reads images in the other order.
    draw_data(tmp_path / "data")
    save_config(recipe(tmp_path / "data", tmp_path / "run"), tmp_path / "config.yaml")
    [one] = label(photos, output, *words, "--config-file", tmp_path / "config.yaml")["annotations"]
    assert one["bbox"] == [0, 0, 32, 24] and one["score"] == 1


def test_the_lines_of_the_documentation(exported, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "handed_on").mkdir()
    graph(tmp_path / "handed_on" / "model.onnx", about={})
    exec(block("set_model_props("), {})
    content = label(photos, tmp_path / "labels.json", "--weights", "handed_on/teacher.onnx")
    assert [one["name"] for one in content["categories"]] == ["cat", "dog", "fish"]
    assert len(content["annotations"]) == 1


@pytest.mark.parametrize(
    "change, line",
    [
        ({"about": {}}, "it.onnx: metadata classes: missing; expected input image: float32"),
        ({"about": ABOUT | {"classes": '"cat"'}}, 'it.onnx: metadata classes: "cat"'),
        ({"about": ABOUT | {"image_format": "L"}}, "it.onnx: metadata image_format: L"),
        ({"about": ABOUT | {"resize": "800"}}, "it.onnx: metadata resize: 800"),
        ({"about": ABOUT | {"resizing": "Resize"}}, "it.onnx: images resized by Resize; expected"),
        ({"size": (1, 3, "H", "W")}, r"it.onnx: inputs image: tensor\(float\) of 4 dimensions"),
        ({"outputs": ["boxes", "classes"]}, "it.onnx: output scores: missing"),
        ({"label": 3}, "it.onnx: classes 3 to 3; expected indices of its 3 classes, from 0"),
        ({"label": -1}, "it.onnx: classes -1 to -1; expected indices of its 3 classes, from 0"),
        ({"shape": (1, 2)}, r"it.onnx: fails on an image of shape \(3, 96, 192\)"),
    ],
)
def test_a_file_of_another_form_is_refused(photos, tmp_path, capfd, monkeypatch, change, line):
    monkeypatch.chdir(tmp_path)
    graph("it.onnx", **change)
    words = ["--images", "photos", "--output", "labels.json", "--weights", "it.onnx"]
    assert re.search(line, refusal(command("label"), words, capfd))
    assert not (tmp_path / "labels.json").exists()


def test_without_onnxruntime(photos, tmp_path, refuses, monkeypatch):
    graph(tmp_path / "it.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    words = ["--images", "photos", "--output", "labels.json", "--weights", "it.onnx"]
    refuses(lambda: command("label")(words), r"onnxruntime: cannot be imported .*'d2kd\[export\]'")


def test_a_file_whose_images_are_resized_otherwise_needs_its_recipe(exported):
    config = load(str(exported / "config.yaml"))
    detector, weights = build(config.model, 0), str(exported / "model.pth")
    assert "resize" not in export_metadata(with_downscaled_student(config, 2), detector, weights)
    config.dataloader.test.mapper.augmentations = [L(T.Resize)(shape=[40, 40])]
    assert "resize" not in export_metadata(config, detector, weights)
    config.dataloader.test.mapper.augmentations = []
    assert export_metadata(config, detector, weights)["resizing"] == "none"
