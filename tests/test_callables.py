"""A recipe may hold functions and objects where Detectron2 takes any: mappers, samplers, loaders, evaluators."""

import functools
import logging
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.data import DatasetMapper, build_detection_train_loader
from detectron2.data import transforms as T
from detectron2.data.samplers import TrainingSampler
from detectron2.evaluation import DatasetEvaluator
from omegaconf import DictConfig, OmegaConf

from d2kd.benchmark.data_loading import check_loadable
from d2kd.comparison.detectors import detector_from_config
from d2kd.config import base_mapper, distill, with_timm_backbone
from d2kd.data import DownscaledStudentMapper
from d2kd.doctor import SanityCheckHook, diagnose
from d2kd.engine import Trainer
from d2kd.engine.evaluation import _numbers
from d2kd.losses import DistillLosses
from d2kd.utils.env import config_hash

from .common import CLASSES, command, tiny_faster_rcnn
from .tiny_run import distiller, draw_data, recipe, teacher_weights, write_recipe

READ, TEST = (DatasetMapper(is_train=x, augmentations=[], image_format="BGR") for x in (1, 0))


def read(record):
    return READ(record)


def read_twice(record, times=1):
    return READ(record)


class Reader:
    def __init__(self, path=None):
        self.path = path

    def __call__(self, record):
        return READ(record)


class Counts(DatasetEvaluator):
    """A custom evaluator, with results of its own."""

    def __init__(self, results=None):
        self.results = results

    def reset(self):
        self.images = 0

    def process(self, inputs, outputs):
        self.images += len(inputs)

    def evaluate(self):
        return self.results or {"own": {"images": self.images}}


class Batches:
    """A loader that ends, or never begins."""

    def __init__(self, folder, count):
        self.folder, self.count = folder, count

    def __iter__(self):
        node = recipe(self.folder, self.folder).dataloader.train
        loader = iter(Trainer.build_train_loader(_around(node)))
        return (next(loader) for _ in range(self.count))


def _around(train):
    return DictConfig(
        {"dataloader": {"train": train}, "train": {"seed": 0}}, flags={"allow_objects": True}
    )


def mapper(value):
    def change(config):
        config.dataloader.train.mapper = value

    return change


def test_mapper(value):
    def change(config):
        config.dataloader.test.mapper = value

    return change


test_mapper.__test__ = False


def loader(**options):
    """Detectron2's own loader, which stays because of its sampler."""

    def change(config):
        config.dataloader.train = L(build_detection_train_loader)(
            dataset=config.dataloader.train.dataset, total_batch_size=2, num_workers=0, **options
        )

    return change


def evaluator(value):
    def change(config):
        config.dataloader.evaluator = value

    return change


WORK = {
    "function": mapper(read),
    "lambda": mapper(lambda record: READ(record)),
    "partial": mapper(functools.partial(read_twice, times=2)),
    "method": mapper(Reader().__call__),
    "object": mapper(READ),
    "own object": mapper(Reader("x")),
    "node of an own class": mapper(L(Reader)(path="x")),
    "function for tests": test_mapper(lambda record: TEST(record)),
    "object for tests": test_mapper(TEST),
    "sampler": loader(mapper=READ, sampler=TrainingSampler(6)),
    "sampler's node": loader(mapper=read, sampler=L(TrainingSampler)(size=6)),
    "evaluator": evaluator(Counts()),
    "evaluators": evaluator([L(Counts)(), Counts({"more": {"x": 1.0}})]),
    "flat results": evaluator(L(Counts)(results={"images": 3})),
}


@pytest.fixture
def config(tmp_path):
    draw_data(tmp_path / "data")
    model = distiller(teacher_weights(tmp_path))
    return recipe(tmp_path / "data", tmp_path / "out", model, max_iter=2, eval_teacher=False)


ALIKE = {"lambda", "method", "object", "own object", "object for tests", "sampler", "evaluators"}
ALIKE |= {"partial", "flat results"}


@pytest.mark.parametrize(
    "change",
    [pytest.param(WORK[name], marks=[pytest.mark.sweep] * (name in ALIKE)) for name in WORK],
    ids=WORK,
)
def test_what_detectron2_takes(config, tmp_path, change):
    """It trains, and again from the run's own config; the doctor sees all there is to see; nothing is written by it."""
    change(config)
    found = {f.subject: f for f in diagnose(config, images=1, iterations=1)}
    assert not [f for f in found.values() if "cannot be" in f.found]
    assert {"channel order", "inputs", "image size", "cost", "task losses"} <= found.keys()
    assert not (tmp_path / "out").exists()
    trainer = Trainer(config)
    trainer.register_hooks([SanityCheckHook()])
    trainer.train()
    command("train")(
        ["--config-file", tmp_path / "out/config.yaml", "--resume", "train.max_iter=3"]
    )
    assert torch.load(tmp_path / "out/model_final.pth")["trainer"]["iteration"] == 2


def test_what_an_object_says_of_itself():
    augmentations = [T.RandomFlip(), T.ResizeShortestEdge(32)]
    reading = DatasetMapper(is_train=True, augmentations=augmentations, image_format="RGB")
    for one in (reading, DownscaledStudentMapper(reading, 2), L(DownscaledStudentMapper)(mapper=reading, scale=2)):  # fmt: skip
        node = base_mapper(one)
        assert node.image_format == "RGB" and list(node.augmentations) == augmentations
    for one in (None, read, lambda x: x, functools.partial(read), Reader()):
        assert base_mapper(one) == {}


def test_a_teacher_is_not_blamed_for_an_evaluator_without_ap(config, caplog):
    config.dataloader.evaluator = Counts()
    config.train.eval_teacher = True
    found = {f.subject: f for f in diagnose(config, images=2, iterations=0)}
    assert found["teacher"].state == "ok" and "gives no bbox/AP" in found["teacher"].found
    with caplog.at_level(logging.INFO):
        Trainer(config).train()
    assert "The teacher's AP is not known" in caplog.text and "does not fit" not in caplog.text


def test_the_first_look_ends_no_run(config, monkeypatch, caplog):
    """A check that fails is a warning, and hides no other."""
    monkeypatch.setattr("d2kd.doctor.static_checks._check_channels", lambda *_: 1 / 0)
    trainer = Trainer(config)
    trainer.register_hooks([SanityCheckHook()])
    with caplog.at_level(logging.INFO):
        trainer.train()
    assert "channel order: cannot be checked (ZeroDivisionError: " in caplog.text
    assert f"classes: {CLASSES} of the student" in caplog.text


def test_the_doctor_goes_on(config, monkeypatch, tmp_path):
    """Past weights that cannot be read, and a check that fails; with debug the error is raised."""
    (tmp_path / "bad.pth").write_text("no weights")
    config.model.teacher.weights = str(tmp_path / "bad.pth")
    module = sys.modules["d2kd.doctor.diagnose"]  # the package has a function of this name
    monkeypatch.setattr(module, "check_sizes", lambda *_: 1 / 0)
    found = {f.subject: f for f in diagnose(config, images=1, iterations=1)}
    assert found["teacher's weights"].state == found["the run"].state == "error"
    assert "ZeroDivisionError" in found["image size"].found
    assert {"learning rate", "inputs", "schedule", "cost", "task losses"} <= found.keys()
    with pytest.raises(ZeroDivisionError):
        list(diagnose(config, images=1, iterations=0, debug=True))


def test_detectors_of_different_functions_are_not_taken_for_alike(tmp_path, monkeypatch):
    """Those without a name to import them by are told apart by their code, and by what they hold."""

    def made(value):
        return lambda record: (record, value)

    own = [lambda record: READ(record), lambda record: TEST(record), made(1), made(2)]
    own += [functools.partial(read_twice, times=k) for k in (1, 2)] + [
        made(made),
        Reader().__call__,
    ]
    own += [Reader(torch.zeros(2)), Reader(torch.ones(2)), Reader({1, 2}), read, Reader]
    hashes = [config_hash({"mapper": one}) for one in own]
    assert len(set(hashes)) == len(own)
    assert hashes == [config_hash({"mapper": one}) for one in own]
    itself = Reader()
    itself.path = [itself]
    assert config_hash({"mapper": itself}) == config_hash({"mapper": itself})


def test_a_detector_whose_mapper_is_a_function_is_compared(config, tmp_path):
    draw = "recipe(_here / 'data', _here / 'out')"
    more = "from tests.test_callables import TEST", "dataloader.test.mapper = lambda r: TEST(r)"
    file = write_recipe(tmp_path / "plain.py", draw, *more)
    weights = config.model.teacher.weights
    assert len(detector_from_config("it", str(file), weights).key["config_sha256"]) == 64


def test_a_loader_that_ends_starts_again(config, tmp_path, caplog):
    config.dataloader.train = Batches(tmp_path / "data", 2)
    config.train.max_iter = 5
    Trainer(config).train()
    assert caplog.text.count("dataloader.train ended after 2 batches: it starts again") == 1


def test_loaders_that_have_nothing(config, tmp_path, refuses):
    config.dataloader.train = Batches(tmp_path / "data", 0)
    step = Trainer(config)._trainer
    refuses(lambda: step.run_step(), "dataloader.train: no batch; expected a loader of endless")
    config.dataloader.train = Batches(tmp_path / "data", 1)
    step = Trainer(config)._trainer
    step.reset_data_loader(iter([step._batches.__next__()]))
    next(step._batches)
    refuses(lambda: next(step._batches), "dataloader.train: no second pass over its batches")


def _set(key, value):
    return lambda config: OmegaConf.update(config, key, value, merge=False)


def _drop_mapper(config):
    del config.dataloader.train["mapper"]


def returning(make):
    """A mapper that returns something else, made of Detectron2's sample."""
    return lambda config: mapper(lambda record: make(READ(record)))(config)


async def read_later(record):
    return READ(record)


def read_each(record):
    yield READ(record)


def relabel(sample):
    sample["instances"].gt_classes[:] = 9
    return sample


def without_key(key):
    return returning(lambda sample: {k: v for k, v in sample.items() if k != key})


NODE = "; expected a node such as L("
READS = "dataloader.train.mapper: returns "
REFUSED = {
    "a mapper's class": (mapper(Reader), f"{READS}a Reader; expected a dict with the image"),
    "an async mapper": (mapper(read_later), f"{READS}a coroutine; expected a dict"),
    "a generator": (mapper(read_each), f"{READS}a generator; expected a dict"),
    "a tuple": (returning(lambda sample: (sample, 1)), f"{READS}a tuple; expected a dict"),
    "no image": (without_key("image"), f"{READS}as 'image' none; expected a tensor"),
    "no objects": (without_key("instances"), f"{READS}no 'instances'; expected those of the image"),
    "an array": (
        returning(lambda sample: sample | {"image": sample["image"].numpy()}),
        f"{READS}as 'image' a ndarray of shape",
    ),
    "channels last": (
        returning(lambda sample: sample | {"image": sample["image"].permute(1, 2, 0)}),
        f"{READS}as 'image' a Tensor of shape .64, 64, 3.; expected a tensor .channels, height",
    ),
    "other classes": (returning(relabel), f"{READS}classes .9.*; expected classes from 0 to 2"),
    "a failing mapper": (
        mapper(lambda record: 1 / 0),
        r"fails \(ZeroDivisionError: .*; expected a fu",
    ),
    "a failing test mapper": (
        test_mapper(lambda record: {}),
        "test.mapper: returns as 'image' none",
    ),
    "no evaluator": (evaluator([None]), f"dataloader.evaluator: null{NODE}COCO"),
    "no mapper": (_drop_mapper, f"dataloader.train.mapper: none{NODE}DatasetMapper"),
    "null": (mapper(None), f"dataloader.train.mapper: none{NODE}"),
    "a name": (test_mapper("mine"), f"dataloader.test.mapper: 'mine'{NODE}"),
    "a mapping": (mapper({"a": 1}), f"dataloader.train.mapper: a mapping without _target_{NODE}"),
    "a loader's mapping": (
        _set("dataloader.train", {"a": 1}),
        f"dataloader.train: a mapping without _target_{NODE}FUN",
    ),
    "a loader's function": (_set("dataloader.train", read), f"the function read{NODE}build_train"),
    "a partial": (
        _set("dataloader.test", functools.partial(read)),
        f"dataloader.test: a partial{NODE}",
    ),
    "a list": (_set("dataloader.train", [[]]), f"dataloader.train: a list of 1{NODE}"),
    "loaders": (_set("dataloader.test", [{}, {}]), f"dataloader.test: a list of 2{NODE}"),
    "a path": (_set("dataloader.train", "a.json"), f"dataloader.train: 'a.json'{NODE}"),
    "no loader": (_set("dataloader.train", None), f"dataloader.train: null{NODE}"),
    "no dataloader": (_set("dataloader", 3), "dataloader: 3; expected a mapping with train"),
    "records": (_set("dataloader.train.dataset", [{}]), f"train.dataset: a list of 1{NODE}get_det"),
    "a set's function": (
        _set("dataloader.train.dataset", read),
        f"dataset: the function read{NODE}",
    ),
    "a class": (evaluator(Counts), f"dataloader.evaluator: the class Counts itself{NODE}COCO"),
    "a function": (evaluator(read), f"dataloader.evaluator: the function read{NODE}"),
    "text": (evaluator(["coco"]), f"dataloader.evaluator: 'coco'{NODE}"),
    "a model": (_set("model", "rcnn"), f"model: 'rcnn'{NODE}"),
    "no teacher": (_set("model.teacher", None), f"model.teacher: null{NODE}"),
    "a schedule": (_set("lr_multiplier", read), f"lr_multiplier: the function read{NODE}Linear"),
    "an augmentation": (
        _set("dataloader.train.mapper.augmentations", [read]),
        r"dataloader.train: cannot be built \(AssertionError: .*; expected values that its _target_",
    ),
    "a rate": (_set("optimizer.lr", -1), r"optimizer: cannot be built \(ValueError: Invalid"),
    "an iterator": (
        lambda config: config.dataloader.train.update(dataset=iter([])),
        "dataloader.train",
    ),
}


@pytest.mark.parametrize("change, line", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_used(config, refuses, change, line):
    change(config)
    line = line.replace("L(", r"L\(")
    refuses(lambda: Trainer(config), line)


@pytest.mark.parametrize(
    "results, expected",
    [
        (None, {}),
        ([1, 2], {}),
        (0.5, {}),
        ({"a": {"b": {"c": 1}}}, {"a": {"b/c": 1.0}}),
        ({"a": {"m": torch.tensor(3), "n": np.float32(2)}}, {"a": {"m": 3.0, "n": 2.0}}),
        ({"bbox": {"AP": None, "curve": [1, 2], "x": torch.ones(3)}, 1: True}, {"bbox": {}, "1": 1.0}),
    ],
    ids=str,
)  # fmt: skip
def test_results_of_any_evaluator(results, expected, caplog):
    assert _numbers(results) == expected
    lost = results is not None and not (expected and "a" in expected)
    assert ("dataloader.evaluator: its" in caplog.text) == lost


def test_a_run_survives_an_odd_evaluator(config):
    evaluator(L(Counts)(results=[3]))(config)
    Trainer(config).train()


def test_a_schedule_that_is_missing_is_mentioned(config, caplog):
    del config["lr_multiplier"]
    Trainer(config)
    assert "no lr_multiplier: the learning rate is constant" in caplog.text


def test_what_a_recipe_does_to_a_mapper_it_does_to_no_function(config, refuses, tmp_path):
    """Its channel order cannot be changed; a teacher of larger images is possible."""
    config.dataloader.train.mapper = read
    config.model = tiny_faster_rcnn()
    line = "dataloader.train.mapper: an object, whose images may not be RGB; expected a node"
    refuses(lambda: with_timm_backbone(config, "test_resnet"), line)
    teacher = L(object)(weights=None)
    made = distill(config, teacher=teacher, losses=L(DistillLosses)(), scale=2)
    assert made.dataloader.train.mapper.mapper is read
    assert made.model.teacher.image_format == "BGR"


def test_the_speed_of_a_loader_without_a_batch_size_is_not_measured(config, refuses):
    config.dataloader.train = L(Batches)(folder=None, count=1)
    line = "dataloader.train: no total_batch_size; expected a node with one"
    refuses(lambda: check_loadable(SimpleNamespace(dataloader=config.dataloader)), line)
