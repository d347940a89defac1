"""Pictures of a run: where, when and of what they are, and that the run does not notice them."""

import json
import random
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.data.catalog import Metadata
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, EventWriter, get_event_storage
from torch import nn

import d2kd.engine.trainer as trainer_module
from d2kd.data import coco_dataset
from d2kd.engine import DrawDetections, Trainer
from d2kd.losses import DistillLosses, ImitationLoss
from d2kd.utils.errors import InputError
from d2kd.utils.random_state import random_state
from d2kd.visualization import panels as visualization
from d2kd.visualization.panels import GAP, STRIP, scenes

from .common import tiny_faster_rcnn
from .test_trainer import assert_same, run, saved
from .tiny_run import distiller, draw_data, recipe, without_evaluation

SIDE = 128  # of a panel: twice the images' own
NAMES = ["detections/01_0", "detections/02_1", "detections/03_2"]  # the third has no object


@pytest.fixture(autouse=True)
def small_panels(monkeypatch):
    monkeypatch.setattr(visualization, "LEGIBLE_SIDE", SIDE)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    draw_data(folder)
    return folder


@pytest.fixture
def album(monkeypatch):
    """What TensorBoard's writer was given, whether or not it is installed."""
    pictures = []

    class Album(EventWriter):
        def __init__(self, folder):
            pass

        def write(self):
            storage = get_event_storage()
            pictures.extend(storage._vis_data)
            storage.clear_images()

    monkeypatch.setattr(trainer_module, "TensorboardXWriter", Album)
    monkeypatch.setattr(trainer_module, "has_tensorboard", lambda: True)
    return pictures


@pytest.fixture
def records(data):
    names = coco_dataset(f"tiny_{data}", str(data / "data.json"), str(data))
    return DatasetCatalog.get(names)[:3]


def hooks_of(trainer):
    return [hook for hook in trainer._hooks if isinstance(hook, DrawDetections)]


def drawing(data, output, model=None, **train):
    train = {"draw_period": 1, "draw_images": 3, "eval_teacher": False, **train}
    return without_evaluation(recipe(data, output, model, **train))


def panels_of(picture, count):
    """The panels below their titles, as (H, W, 3)."""
    picture = np.asarray(picture).transpose(1, 2, 0)
    assert picture.dtype == np.uint8
    assert picture.shape == (SIDE + STRIP, count * SIDE + (count - 1) * GAP, 3)
    return [picture[STRIP:, i * (SIDE + GAP) : i * (SIDE + GAP) + SIDE] for i in range(count)]


class Sees(nn.Module):
    """A detector that finds one object of a class everywhere, and draws a random number for it."""

    def __init__(self, index=0, num_classes=3, score=0.9):
        super().__init__()
        self.index, self.num_classes, self.score = index, num_classes, score
        self.norm, self.frozen = nn.BatchNorm2d(3), nn.BatchNorm2d(3).eval()
        self.calls = []

    def forward(self, batch):
        torch.rand(1), np.random.rand(), random.random()
        modes = [module.training for module in self.modules()]
        self.calls.append((torch.is_grad_enabled(), *modes))
        self.norm(batch[0]["image"][None].float())
        seen = Instances((batch[0]["height"], batch[0]["width"]))
        seen.pred_boxes = Boxes(torch.tensor([[8.0, 8.0, 40.0, 40.0]], requires_grad=True))
        seen.pred_classes, seen.scores = torch.tensor([self.index]), torch.tensor([self.score])
        return [{"instances": seen}]


def draw_once(records, student, teacher=None, metadata=None, names=None):
    """The pictures of a run of one step."""
    mapper = DatasetMapper(is_train=False, augmentations=[], image_format="BGR")
    metadata = metadata or Metadata(thing_classes=["a", "b", "c"])
    hook = DrawDetections(1, scenes(records, mapper), metadata, student, names, teacher)
    with EventStorage() as storage:
        hook.trainer = SimpleNamespace(iter=0, max_iter=1, storage=storage)
        hook.before_train()
        hook.after_step()
    return {name: picture for name, picture, _ in storage._vis_data}


def test_pictures_come_at_the_period_and_at_the_end(data, tmp_path, album):
    model = distiller()
    model.teacher.input_format = "RGB"
    config = drawing(data, tmp_path, model, draw_period=2, max_iter=5, log_period=5)
    trainer = Trainer(config)
    shown = {"student": [], "teacher": []}
    detectors = trainer.model.student, trainer.model.teacher.detector
    for seen, detector in zip(shown.values(), detectors):
        detector.register_forward_pre_hook(
            lambda it, inputs, seen=seen: None if it.training else seen.append(inputs[0])
        )
    trainer.train()

    assert [(name, step) for name, _, step in album] == [(n, i) for i in (1, 3, 4) for n in NAMES]
    # The teacher is asked about each image once, in its own channel order.
    assert len(shown["teacher"]) == 3 and len(shown["student"]) == 9
    for [one], [other] in zip(shown["teacher"], shown["student"]):
        assert torch.equal(one["image"], other["image"].flip(0))
        assert "instances" not in one
    pictures = [panels_of(picture, 3) for _, picture, _ in album]
    for [image], *one_scene in zip(shown["student"][:3], pictures[:3], pictures[3:6], pictures[6:]):
        for truth, taught, _ in one_scene:
            assert np.array_equal(truth, one_scene[0][0])
            assert np.array_equal(taught, one_scene[0][1])
        bgr = image["image"].permute(1, 2, 0).numpy()
        bare = bgr[:, :, ::-1].repeat(2, axis=0).repeat(2, axis=1)
        without_objects = image["file_name"].endswith("2.png")
        assert np.array_equal(one_scene[0][0], bare) == without_objects


def test_a_run_is_the_same_with_and_without(data, tmp_path, album):
    for period in (0, 1):
        model = distiller(losses=L(DistillLosses)(imitation=L(ImitationLoss)()))
        model.student.backbone.bottom_up.norm = "BN"  # has statistics that a forward pass moves
        run(drawing(data, tmp_path / str(period), model, draw_period=period))
        assert len(album) == period * 4 * 3
    without, drawn = (saved(tmp_path / f"{period}/model_final.pth") for period in (0, 1))
    for checkpoint in (without, drawn):
        del checkpoint["trainer"]["seconds"]
    assert_same(without, drawn)  # with it the random state of the run's end


@pytest.fixture
def labels(monkeypatch):
    """What the labels of the next pictures are, in the order in which they are drawn, without scores."""
    drawn, label = [], visualization._label

    def keep(*arguments):
        drawn.append(re.sub(r" \d+%$", "", label(*arguments)))
        return label(*arguments)

    monkeypatch.setattr(visualization, "_label", keep)
    return drawn


def teacher_that(sees, **known):
    nothing = {"classes": None, "weights": None}
    return SimpleNamespace(detector=sees, detect=sees, **{**nothing, **known})


@pytest.mark.parametrize("known", ["classes", "weights", None])
def test_each_panel_has_its_own_names(records, labels, tmp_path, known):
    """As many classes are not the same classes: every detector is drawn with the names of its own."""
    torch.save(
        {"model": {"weight": torch.zeros(1)}, "classes": ["c", "a", "b"]}, tmp_path / "teacher.pth"
    )
    values = {"classes": ("c", "a", "b"), "weights": str(tmp_path / "teacher.pth")}
    teacher = teacher_that(Sees(2), **({known: values[known]} if known else {}))
    draw_once([{**records[0], "annotations": []}], Sees(1), teacher, names=["a", "c", "b"])
    assert labels == ["b", "c"]


def test_a_student_of_some_of_the_classes(records, labels):
    """Two of four were learned, one before: the last one is of an increment to come."""
    student = Sees(1, 2)
    student.num_old_classes = 1
    boxes = records[0]["annotations"][0]
    truth = [{**boxes, "category_id": k} for k in range(4)]
    metadata = Metadata(thing_classes=["d", "b", "c", "a"])
    old = teacher_that(Sees(0, 1))
    draw_once([{**records[0], "annotations": truth}], student, old, metadata, ["a", "b"])
    assert labels == ["d", "b (new)", "c", "a (old)", "a (old)", "b (new)"]


def test_it_only_looks(records):
    def state():
        weights = {name: value.clone() for name, value in student.state_dict().items()}
        return random_state(), weights, [module.training for module in student.modules()]

    student, frozen = Sees().train(), Sees().eval()
    student.frozen.eval()  # and is not to be woken
    teacher = teacher_that(frozen)
    before = state()
    pictures = draw_once(records, student, teacher)
    assert_same(before, state())
    assert student.calls == frozen.calls == [(False,) * 4] * 3  # no gradient, all in eval()
    for picture in pictures.values():
        _, taught, learned = panels_of(picture, 3)
        assert np.array_equal(taught, learned)  # they see the same
    student.forward = None  # an error, after which modes are as before too
    with pytest.raises(TypeError):
        draw_once(records, student)
    assert state()[2] == before[2]


@pytest.mark.parametrize(
    "names, index, count, score",
    [
        (None, 2, 3, 0.31),  # a data set that names no class
        (["only"], 2, 1, 0.9),  # a class beyond the names
        (["a", "b", "c"], 79, 80, 0.9),  # a detector of other classes
        (["a", "b", "c"], 0, 3, 0.29),  # below the threshold
    ],
)
def test_a_class_without_a_name(records, names, index, count, score):
    metadata = Metadata(thing_classes=names) if names else Metadata()
    names = names if len(names or ()) == count else None
    pictures = draw_once(records, Sees(index, count, score), metadata=metadata, names=names)
    assert list(pictures) == NAMES
    empty, seen = panels_of(pictures[NAMES[2]], 2)
    assert np.array_equal(empty, seen) == (score < 0.3)


def test_what_a_plain_recipe_draws(data, tmp_path, album, monkeypatch):
    assert not hooks_of(Trainer(drawing(data, tmp_path, draw_period=0)))
    run(drawing(data, tmp_path, draw_images=99, max_iter=1))
    assert [name for name, *_ in album[:3]] == NAMES and len(album) == 6  # all there are
    for _, picture, _ in album:
        panels_of(picture, 2)
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert not hooks_of(Trainer(drawing(data, tmp_path)))


def test_without_tensorboard_it_says_so_once(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    trainer = run(drawing(data, tmp_path, max_iter=2))
    assert not hooks_of(trainer) and not list(tmp_path.glob("events*"))
    assert (tmp_path / "log.txt").read_text().count("draw_period has no effect") == 1


def test_bad_input(data, tmp_path, album):
    def refused(match, without=None, folder=data, **train):
        config = drawing(folder, tmp_path / "out", **train)
        if without:
            del config.dataloader["test"][without]
        with pytest.raises(InputError, match=match):
            Trainer(config)
        assert not (tmp_path / "out").exists()

    refused("train.draw_period: -1; expected an integer, at least 0", draw_period=-1)
    refused("train.draw_period: often", draw_period="often")
    refused("train.draw_images: 0; expected an integer, at least 1", draw_images=0)
    refused("dataloader.test.mapper: none; expected a node", "mapper")
    refused("has no dataloader.test.dataset.names; expected images to draw", "dataset")
    draw_data(tmp_path / "data")
    (tmp_path / "data" / "1.png").write_bytes(b"no picture")
    refused("1.png: cannot be decoded", folder=tmp_path / "data")


def test_tensorboard_reads_them(data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(drawing(data, tmp_path, tiny_faster_rcnn(), draw_period=2, log_period=3, max_iter=3))
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    assert events.Tags()["images"] == NAMES
    for name in NAMES:
        assert [picture.step for picture in events.Images(name)] == [1, 2]
        assert events.Images(name)[0].width == 2 * SIDE + GAP
    assert "loss_cls" in events.Tags()["scalars"]
    assert json.loads((tmp_path / "run.json").read_text())["rows"][0]["iterations"] == 3
