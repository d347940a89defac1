"""A teacher is loaded strictly, sees its own kind of image, and stays out of sight."""

import copy

import pytest
import torch

from d2kd.errors import InputError
from d2kd.modeling import Teacher

from .common import DETECTORS, batch, build, tiny_retinanet


@pytest.fixture
def detector():
    return build(tiny_retinanet())


@pytest.fixture
def weights(detector, tmp_path):
    path = tmp_path / "teacher.pth"
    torch.save({"model": detector.state_dict()}, path)
    return path


def test_weights_are_loaded_whole(detector, weights):
    teacher = Teacher(build(tiny_retinanet(), seed=5), str(weights))
    for key, value in detector.state_dict().items():
        assert torch.equal(value, teacher.detector.state_dict()[key])
    assert not teacher.detector.training
    assert not any(p.requires_grad for p in teacher.detector.parameters())
    assert len(teacher.weights_sha256) == 64


def test_the_hash_follows_the_file(detector, weights):
    before = Teacher(copy.deepcopy(detector), str(weights)).weights_sha256
    torch.save({"model": build(tiny_retinanet(), 7).state_dict(), "more": 1}, weights)
    assert Teacher(copy.deepcopy(detector), str(weights)).weights_sha256 != before


def test_statistics_and_anchors_of_old_files_are_forgiven(detector, tmp_path):
    path = tmp_path / "old.pth"
    extra = {"pixel_mean": torch.zeros(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)}
    extra["anchor_generator.cell_anchors.0"] = torch.zeros(6, 4)
    torch.save({"model": {**detector.state_dict(), **extra}}, path)
    teacher = Teacher(build(tiny_retinanet()), str(path))
    assert torch.equal(teacher.detector.pixel_mean, detector.pixel_mean), "the file's came through"


def _save(path, state):
    torch.save({"model": state}, path)


@pytest.mark.parametrize(
    "spoil, found",
    [
        (lambda path, state: path.unlink(), "no such file"),
        (lambda path, state: path.write_bytes(path.read_bytes()[:-700]), "cannot be read"),
        (lambda path, state: path.write_bytes(b""), "cannot be read"),
        (lambda path, state: path.write_text("not weights"), "cannot be read"),
        (lambda path, state: torch.save([1, 2], path), "no 'model'|cannot be read"),
        (lambda path, state: _save(path, dict(list(state.items())[:-1])), "1 missing"),
        (lambda path, state: _save(path, {**state, "extra.weight": torch.ones(1)}), "1 unexpected"),
        (
            lambda path, state: _save(path, {k: v[None] for k, v in state.items()}),
            "misshapen",
        ),
    ],
)
def test_bad_weights_are_named(detector, weights, spoil, found):
    spoil(weights, detector.state_dict())
    with pytest.raises(InputError, match=found) as error:
        Teacher(build(tiny_retinanet()), str(weights))
    assert str(weights) in error.value.culprit and "\n" not in str(error.value)


@pytest.mark.parametrize("family", DETECTORS)
def test_own_channel_order_and_statistics(family):
    """An RGB teacher of BGR images answers as if it had been given RGB images and its own statistics."""
    examples = batch()
    node = DETECTORS[family]()
    said = None
    if family == "fcos":  # which does not know its channel order, so the teacher is told
        said = "RGB"
    else:
        node.input_format = "RGB"
    node.pixel_mean, node.pixel_std = [123.0, 116.0, 103.0], [58.0, 57.0, 56.0]
    teacher = Teacher(build(node), None, image_format="BGR", input_format=said)
    plain = Teacher(build(node), None, image_format="RGB", input_format=said)
    assert teacher.flip_channels and not plain.flip_channels
    turned = [{**x, "image": x["image"].flip(0)} for x in examples]
    before = examples[0]["image"].clone()
    for level, feature in teacher.ask(examples).features.items():
        torch.testing.assert_close(feature, plain.ask(turned).features[level])
    assert torch.equal(before, examples[0]["image"]), "the student's batch was changed"
    mean = torch.tensor([123.0, 116.0, 103.0]).view(3, 1, 1)
    torch.testing.assert_close(teacher.detector.pixel_mean, mean)
