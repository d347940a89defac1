"""What a run does, leaves and refuses; how it goes on; and that with every weight 0 it is Detectron2's."""

import copy
import itertools
import json
import math
import pickle

import detectron2.data.transforms as T
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import HookBase
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn
from torch.utils.data import IterableDataset

import d2kd.engine.trainer as trainer_module
from d2kd import testing
from d2kd.data import coco_dataset, estimate_priors, register_voc
from d2kd.engine import Trainer
from d2kd.engine.launch import process_group
from d2kd.engine.train_step import wrap_ddp
from d2kd.losses import DistillLosses, ICDLoss, ImitationLoss
from d2kd.losses.base import DistillLoss
from d2kd.modeling import Teacher
from d2kd.structures.class_map import ClassMap
from d2kd.utils.errors import InputError

from .common import CLASSES, batch, build, tiny_faster_rcnn, tiny_retinanet
from .resume_runs import differences, stock
from .resume_runs import saved as whole_but_seconds
from .test_voc import write_voc
from .tiny_run import distiller, draw_data, recipe, teacher_weights, without_evaluation


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    draw_data(folder)
    return folder


def run(config, resume=False):
    trainer = Trainer(config)
    trainer.resume_or_load(resume)
    trainer.train()
    return trainer


def saved(file):
    return torch.load(file, weights_only=True)


def assert_same(one, other):
    assert differences(one, other) == []


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_leaves_its_record_and_a_plain_detector(data, tmp_path):
    losses = L(DistillLosses)(breaks=L(Breaks)(at=-1), imitation=L(ImitationLoss)())
    config, out = (
        recipe(data, tmp_path / "out", distiller(losses=losses), max_iter=2),
        tmp_path / "out",
    )
    trainer = Trainer(config)
    trainer.resume_or_load(resume=True)
    assert not out.exists()
    trainer.train()

    learning = {id(p) for p in trainer.model.parameters() if p.requires_grad}
    parts = trainer.checkpointer.model, trainer.checkpointer.checkpointables["losses"]
    assert learning <= {id(p) for part in parts for p in part.parameters()}
    optimized = {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
    assert not optimized & {id(p) for p in trainer.model.teacher.detector.parameters()}
    checkpoint = saved(out / "model_final.pth")
    assert checkpoint["iteration"] == 1 and "losses" in checkpoint
    assert not [key for key in checkpoint["model"] if "teacher" in key or "student" in key]
    stock = build(tiny_faster_rcnn(), seed=5)
    stock.load_state_dict(checkpoint["model"], strict=True)
    loaded = build(tiny_faster_rcnn(), seed=6)
    rest = DetectionCheckpointer(loaded).load(str(out / "model_final.pth"))
    assert rest["iteration"] == 1
    expected = trainer.model.student.eval()(batch())
    for detector in (stock, loaded):
        for one, other in zip(detector.eval()(batch()), expected):
            one, other = one["instances"], other["instances"]
            assert_same(one.scores, other.scores)
            assert_same(one.pred_boxes.tensor, other.pred_boxes.tensor)

    metrics = [line for line in lines(out / "metrics.json") if "total_loss" in line]
    assert [line["iteration"] for line in metrics] == [0, 1]
    assert all("distill/loss_breaks" in line and "loss_cls" in line for line in metrics)
    assert "bbox/AP" in lines(out / "metrics.json")[-1]
    record = json.loads((out / "run.json").read_text())
    assert record["schema"] == 1 and record["versions"]["torch"] == torch.__version__
    assert record["teacher"]["weights_sha256"] is None
    [row] = record["rows"]
    assert row["iterations"] == 2 and row["seconds"] > 0 and "AP" in row["results"]["bbox"]
    assert (out / "log.txt").stat().st_size and "_target_" in (out / "config.yaml").read_text()
    assert "inference" in {path.name for path in out.iterdir()}
    assert not list(out.glob(".*"))


def test_resumed_is_uninterrupted(data, tmp_path):
    def config(folder):
        config = recipe(data, tmp_path / folder, distiller(), eval_period=3)
        config.train.checkpointer.period = 2
        return config

    run(config("whole"))
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    name = "model_0000001.pth"
    state = saved(tmp_path / "whole" / name)
    state["trainer"]["seconds"] += 1000.0  # spent before
    torch.save(state, resumed / name)
    (resumed / "last_checkpoint").write_text(name)
    (resumed / "metrics.json").write_text('{"iteration": 1}\n{"iteration": 2}\n{"iter')
    trainer = run(config("resumed"), resume=True)
    assert trainer.start_iter == 2

    one, other = saved(tmp_path / "whole/model_final.pth"), saved(resumed / "model_final.pth")
    for state, before in ((one, 0), (other, 1000)):
        assert before < state["trainer"].pop("seconds") < before + 1000
    assert_same(one, other)
    iterations = [line["iteration"] for line in lines(resumed / "metrics.json")]
    assert iterations == sorted(iterations) and iterations.count(2) == 1 and iterations[0] == 1


def test_with_every_weight_zero_it_is_detectron2(data, tmp_path):
    config = recipe(data, tmp_path, distiller(teacher_weights(tmp_path)), max_iter=5, seed=3)
    model = run(without_evaluation(config)).model
    assert any(p.numel() for p in model.losses.parameters())  # there was an adapter to build
    assert_same(dict(model.student.state_dict()), dict(stock(config).state_dict()))


class Breaks(DistillLoss):
    """Compares features, and is not finite at one iteration."""

    def __init__(self, at, weight=1.0):
        super().__init__(weight=weight)
        self.at = at

    def forward(self, student, teacher):
        gap = sum((f.mean() - teacher.features[p].mean()) ** 2 for p, f in student.features.items())
        return gap * math.nan if get_event_storage().iter == self.at else gap


def two_stage_with_statistics(at):
    """A student that draws its proposals, and has statistics that a forward pass moves."""
    model = distiller(losses=L(DistillLosses)(breaks=L(Breaks)(at=at)))
    model.student.backbone.bottom_up.norm = "BN"
    return model


def one_stage_with_draws(at):
    """A student that has a running mean of its foreground, and a loss that counts its draws."""
    priors = L(estimate_priors)(names="${dataloader.train.dataset.names}")
    icd = L(ICDLoss)(heads=4, priors=priors)
    model = distiller(losses=L(DistillLosses)(icd=icd, breaks=L(Breaks)(at=at)))
    model.student, model.teacher.detector = tiny_retinanet(), tiny_retinanet(channels=24)
    return model


@pytest.mark.parametrize("made", [two_stage_with_statistics, one_stage_with_draws])
def test_a_loss_that_is_not_finite_is_named_and_never_saved(data, tmp_path, made):
    """The checkpoint before it is that of a run without it, and a resumed run goes on as if nothing had been."""

    def config(folder, at, max_iter):
        model = made(at)
        config = recipe(data, tmp_path / folder, model, max_iter=max_iter, log_period=20)
        config.train.checkpointer.period = 1
        config.lr_multiplier.end_value = 1.0
        return without_evaluation(config)

    kept = tmp_path / "broken/model_0000001.pth"
    with pytest.raises(InputError, match="distill/loss_breaks at iteration 2: nan; expected") as it:
        run(config("broken", at=2, max_iter=4))
    assert len(str(it.value).splitlines()) == 1
    assert str(it.value).endswith(f"--resume continues from {kept}")
    assert "Traceback" not in (tmp_path / "broken/log.txt").read_text()
    run(config("whole", at=-1, max_iter=2))
    assert_same(whole_but_seconds(kept), whole_but_seconds(tmp_path / "whole/model_0000001.pth"))
    assert run(config("broken", at=-1, max_iter=4), resume=True).start_iter == 2
    run(config("whole", at=-1, max_iter=4), resume=True)
    finals = [tmp_path / name / "model_final.pth" for name in ("broken", "whole")]
    assert_same(*map(whole_but_seconds, finals))


@pytest.mark.parametrize("at", [2, 3])
def test_it_is_named_with_its_iteration_by_the_next_step(data, tmp_path, at):
    """Or at the end: after the last step there is none."""
    config = recipe(data, tmp_path, two_stage_with_statistics(at), max_iter=4, log_period=20)
    with pytest.raises(InputError) as it:
        run(without_evaluation(config))
    line = f"distill/loss_breaks at iteration {at}: nan; expected a finite number; no checkpoint was written before"
    assert str(it.value) == line
    assert not list(tmp_path.glob("*.pth"))


def test_a_student_that_diverges_is_reported_alike(data, tmp_path):
    config = without_evaluation(recipe(data, tmp_path / "out", log_period=20))
    config.optimizer.lr = 1e12
    config.train.checkpointer.period = 1
    with pytest.raises(InputError, match="at iteration [12]: (nan|inf); expected"):
        run(config)
    *_, last = sorted((tmp_path / "out").glob("*.pth"))
    assert all(value.isfinite().all() for value in saved(last)["model"].values())


def test_metrics_that_are_read_later_are_those_of_their_iteration(data, tmp_path):
    """Whatever the period of the log, a line has what that of every step has."""
    for period in (1, 3):
        config = recipe(data, tmp_path / str(period), distiller(), max_iter=7, log_period=period)
        config.model.losses.imitation.weight = 1.0
        run(without_evaluation(config))
    every, some = (lines(tmp_path / name / "metrics.json") for name in "13")
    assert [line["iteration"] for line in some] == [2, 5, 6]
    every = {line["iteration"]: line for line in every}
    for line in some:
        assert {"distill/loss_imitation", "lr"} <= line.keys()
        for key in ("distill/loss_imitation", "loss_cls", "total_loss", "lr"):
            assert line[key] == every[line["iteration"]][key], key


@pytest.mark.parametrize("clip_type", ["full_model", "norm", "value"])
def test_clipping(data, tmp_path, clip_type):
    clip = {"enabled": True, "clip_type": clip_type, "clip_value": 1e-3, "norm_type": 1.0}
    config = recipe(data, tmp_path, max_iter=1, clip_gradients=clip)
    config.optimizer.weight_decay = 0.0
    trainer = Trainer(without_evaluation(config))
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    moved = [(a - b).flatten() for a, b in zip(trainer.model.parameters(), before)]
    if clip_type == "full_model":
        moved = [torch.cat(moved)]
    found = max(m.abs().max() if clip_type == "value" else m.norm(1) for m in moved)
    assert 0 < found <= 1e-3 * config.optimizer.lr * 1.01


@pytest.mark.parametrize("chosen", [True, False])
def test_whether_cudnn_looks_for_the_fastest(data, tmp_path, monkeypatch, chosen):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not chosen)
    Trainer(recipe(data, tmp_path / "out", cudnn_benchmark=chosen))
    assert torch.backends.cudnn.benchmark is chosen


@pytest.mark.parametrize("compress", [False, True])
def test_gradients_may_travel_in_half_precision(monkeypatch, compress):
    for name, value in dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_PORT=0).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    alone, inputs = nn.Linear(5, 3), torch.randn(7, 5)
    alone(inputs).square().sum().backward()
    gradient = alone.weight.grad.clone()
    rounded = gradient.half().float()
    assert not torch.equal(gradient, rounded)
    alone.zero_grad()
    options = {"broadcast_buffers": False, "find_unused_parameters": True}
    with process_group("cpu"):
        assert wrap_ddp(alone, torch.device("cpu"), {"fp16_compression": compress}) is alone
        monkeypatch.setattr(comm, "get_world_size", lambda: 2)
        model = wrap_ddp(alone, torch.device("cpu"), {**options, "fp16_compression": compress})
        model(inputs).square().sum().backward()
        assert {name: getattr(model, name) for name in options} == options
    assert torch.equal(alone.weight.grad, rounded if compress else gradient)


def test_the_recipe_says_how_gradients_travel(data, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(
        trainer_module, "wrap_ddp", lambda model, *rest: given.append(rest) or model
    )
    config = recipe(data, tmp_path / "out", ddp={"fp16_compression": True})
    trainer = Trainer(config)
    [(device, options)] = given
    assert device == trainer.device and options == {**config.train.ddp, "fp16_compression": True}


def test_results_that_are_undefined_are_no_results():
    results = {"bbox": {"AP": 0.5, "APl": math.nan}, "accuracy": 0.25, "loss": math.inf}
    assert trainer_module.finite_metrics(results) == {"bbox": {"AP": 0.5}, "accuracy": 0.25}


@pytest.mark.parametrize("student", [tiny_faster_rcnn, tiny_retinanet])
def test_bfloat16_on_the_cpu(data, tmp_path, student):
    def seen(folder, **amp):
        amp = {"amp": {"dtype": "bfloat16", **amp}}
        config = without_evaluation(recipe(data, tmp_path / folder, student(), max_iter=2, **amp))
        trainer, dtypes = Trainer(config), []
        trainer.model.backbone.register_forward_hook(
            lambda *args: dtypes.extend(x.dtype for x in args[-1].values())
        )
        trainer.train()
        return set(dtypes)

    assert seen("whole", enabled=False) == {torch.float32}
    assert seen(".", enabled=True) == {torch.bfloat16}
    assert all(math.isfinite(line["total_loss"]) for line in lines(tmp_path / "metrics.json"))


def test_the_teacher_is_measured_once(data, tmp_path, monkeypatch):
    calls = []

    def measure(config, model, **options):
        calls.append(model)
        return {"bbox": {"AP": 0.3}}

    monkeypatch.setattr(trainer_module, "do_test", measure)
    weights = teacher_weights(tmp_path)

    def evaluations(folder, resume=False, detections=100, **train):
        calls.clear()
        config = recipe(data, tmp_path / folder, distiller(weights), max_iter=1, **train)
        config.dataloader.evaluator.max_dets_per_image = detections
        run(config, resume)
        return sum(not isinstance(model, torch.nn.Module) for model in calls)

    assert evaluations("first") == 1
    teacher = json.loads((tmp_path / "first/run.json").read_text())["teacher"]
    assert teacher["AP"] == 0.3 and len(teacher["weights_sha256"]) == 64
    assert "!!!!" in (tmp_path / "first/log.txt").read_text()
    assert evaluations("second") == 0  # known to the user's cache
    assert "!!!!" in (tmp_path / "second/log.txt").read_text()
    (tmp_path / "cache/teachers.json").unlink()
    record = json.loads((tmp_path / "first/run.json").read_text())
    record["rows"][0]["finished"] = False
    (tmp_path / "first/run.json").write_text(json.dumps(record))
    assert evaluations("first", resume=True) == 0  # known to the run
    assert len(json.loads((tmp_path / "first/run.json").read_text())["rows"]) == 2
    assert evaluations("third", eval_teacher=False) == 0
    assert evaluations("fourth") == 1
    assert evaluations("fifth") == 0
    assert evaluations("sixth", detections=50) == 1  # another question
    annotations = data / "data.json"
    annotations.write_text(annotations.read_text() + "\n")
    assert evaluations("seventh") == 1  # other annotations of the same name


def test_features_are_measured_on_the_images_as_they_are(data, tmp_path, caplog):
    """Before the first step, on the test mapper's training images; a resumed run keeps what was measured."""
    losses = L(DistillLosses)(imitation=L(ImitationLoss)(levels=["p3"]))
    config = recipe(data, tmp_path / "out", distiller(losses=losses), max_iter=2)
    config.train.checkpointer.period = 1
    config.dataloader.train.mapper.augmentations = [
        L(T.RandomContrast)(intensity_min=0.1, intensity_max=0.2)
    ]
    trainer = run(without_evaluation(config))
    rms = trainer.model.losses.by_name["imitation"].rms("p3")
    maps = []
    for record in instantiate(config.dataloader.train.dataset):
        example = instantiate(config.dataloader.test.mapper)(record)
        height, width = example["image"].shape[-2:]
        found = trainer.model.teacher.outputs([example]).features["p3"]
        maps.append(found[..., : math.ceil(height / 8), : math.ceil(width / 8)].flatten())
    assert rms.item() == pytest.approx(torch.cat(maps).square().mean().sqrt().item(), rel=1e-4)

    (tmp_path / "out/last_checkpoint").write_text("model_0000000.pth")
    config.dataloader.test.mapper.augmentations = [
        L(T.RandomContrast)(intensity_min=0.1, intensity_max=0.2)
    ]
    resumed = run(config, resume=True)
    assert resumed.start_iter == 1
    assert_same(resumed.model.losses.by_name["imitation"].rms("p3"), rms)
    assert "first training batch" not in caplog.text


def test_without_a_list_of_images_the_first_batch_is_measured(data, tmp_path, caplog, refuses):
    losses = L(DistillLosses)(imitation=L(ImitationLoss)(levels=["p3"]))
    config = without_evaluation(recipe(data, tmp_path, distiller(losses=losses), max_iter=1))
    del config.dataloader["test"]
    assert run(config).model.losses.by_name["imitation"].rms("p3") > 0
    assert "first training batch" in caplog.text
    model = testing.distiller(ImitationLoss, tiny_faster_rcnn)
    refuses(lambda: model.measure_features([]), "measure_features: no batch")


class _Stream(IterableDataset):
    def __init__(self, records, mapper):
        self.records, self.mapper = records, mapper

    def __iter__(self):
        return ([self.mapper(record)] for record in itertools.cycle(self.records))


def _loader(dataset):
    return iter(dataset)


def test_a_stream_of_images_is_not_read_for_the_measurement(data, tmp_path, caplog):
    losses = L(DistillLosses)(imitation=L(ImitationLoss)(levels=["p3"]))
    config = without_evaluation(recipe(data, tmp_path, distiller(losses=losses), max_iter=1))
    train = config.dataloader.train
    config.dataloader.train = L(_loader)(
        dataset=L(_Stream)(records=train.dataset, mapper=train.mapper)
    )
    assert run(config).model.losses.by_name["imitation"].rms("p3") > 0
    assert "first training batch" in caplog.text


def test_an_image_that_cannot_be_read_for_the_measurement_is_named(data, tmp_path):
    losses = L(DistillLosses)(imitation=L(ImitationLoss)(levels=["p3"]))
    config = without_evaluation(recipe(data, tmp_path, distiller(losses=losses), max_iter=1))
    broken = tmp_path / "broken.png"
    broken.write_bytes((data / "0.png").read_bytes())
    node = L(_with_file)(records=config.dataloader.train.dataset, file=str(broken))
    config.dataloader.train.dataset = node
    trainer = Trainer(config)
    broken.write_bytes(b"")
    READ.clear()  # the loader has the annotations, which are not read again
    with pytest.raises(InputError, match="broken.png: cannot be decoded"):
        trainer.train()
    assert not READ and not trainer.model.losses.by_name["imitation"].rms("p3")


READ = []
"""Files for which :func:`_with_file` was called."""


def _with_file(records, file):
    READ.append(file)
    return [{**record, "file_name": file} for record in records]


NAMES = [f"class {k}" for k in range(CLASSES)]
STRANGE = ["zebra", "class 2", "class 0", "okapi", "Class_1"]


def knowing_everything(detector_classes, data):
    """A teacher's ``detect``: every object of the data, in the teacher's own classes, and a zebra if it knows one."""
    number = ClassMap.from_names(NAMES, detector_classes)
    own = dict(number.pairs)
    records = {}

    def detect(teacher, examples):
        if not records:
            records.update({r["image_id"]: r for r in DatasetCatalog.get(data)})
        found = []
        for example in examples:
            objects = records[example["image_id"]]["annotations"]
            objects = [a for a in objects if a["category_id"] in own]
            boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in objects]
            labels = [own[a["category_id"]] for a in objects]
            if "zebra" in detector_classes:
                boxes.append([0.0, 0.0, 9.0, 9.0])
                labels.append(detector_classes.index("zebra"))
            seen = Instances((example["height"], example["width"]))
            seen.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
            seen.pred_classes = torch.tensor(labels, dtype=torch.int64)
            seen.scores = torch.ones(len(labels))
            found.append({"instances": seen})
        return found

    return detect


@pytest.mark.parametrize("format", ["coco", "voc"])
@pytest.mark.parametrize(
    "classes", [NAMES, NAMES[::-1], STRANGE], ids="same turned strange".split()
)
def test_a_teacher_is_measured_as_the_student_is(data, tmp_path, monkeypatch, format, classes):
    """One that knows everything has an AP of 100, whatever else it knows and however it counts."""
    teacher = tiny_faster_rcnn(channels=24, classes=len(classes))
    weights = tmp_path / "teacher.pth"
    torch.save({"model": build(teacher, 7).state_dict()}, weights)
    model = distiller(str(weights))
    model.classes = NAMES
    model.teacher.update(detector=teacher, classes=classes)
    config = recipe(data, tmp_path / "out", model, max_iter=1)
    name = f"tiny_{data}"
    if format == "voc":
        name, root = f"tiny_voc_{tmp_path}", write_voc(tmp_path / "voc", names=NAMES)
        names = L(register_voc)(name=name, root=str(root), split="train", classes=NAMES)
        for node in (config.dataloader.train.dataset, config.dataloader.test.dataset):
            node.names = names
        config.dataloader.evaluator.dataset_name = names
    monkeypatch.setattr(Teacher, "detect", knowing_everything(classes, name))
    run(config)
    record = json.loads((tmp_path / "out/run.json").read_text())["teacher"]
    assert record["AP"] == pytest.approx(100)
    log = (tmp_path / "out/log.txt").read_text()
    assert "The teacher's AP is 100.00" in log and "does not fit this data" not in log
    for folder in ("out", "out/teacher"):  # each has its own detections
        assert (tmp_path / folder / "inference/coco_instances_results.json").is_file()


@pytest.mark.parametrize(
    "names, reason",
    [
        (["x", "y", "z", "zebra"], "none of its classes is the student's"),
        (None, "it has 4 classes, the student 3, and no names"),
    ],
)
def test_a_teacher_of_which_no_class_is_known_is_not_measured(data, tmp_path, names, reason):
    model = distiller()
    model.teacher.detector = tiny_faster_rcnn(channels=24, classes=4)
    if names:
        model.classes, model.teacher.classes = NAMES, names
    run(recipe(data, tmp_path / "out", model, max_iter=1))
    log = (tmp_path / "out/log.txt").read_text()
    assert f"The teacher's AP is not measured: {reason}" in log
    assert "does not fit this data" not in log
    assert json.loads((tmp_path / "out/run.json").read_text())["teacher"]["AP"] is None


def test_the_best_state_is_kept(data, tmp_path, monkeypatch):
    # The fifth is the fourth once more: what a longer run would have at that iteration, too.
    scores = iter([10.0, 30.0, math.nan, 20.0, 20.0, 20.0, 40.0])
    monkeypatch.setattr(trainer_module, "do_test", lambda *_, **__: {"bbox": {"AP": next(scores)}})

    def best():
        return saved(tmp_path / "model_best.pth")["iteration"]

    config = recipe(data, tmp_path, max_iter=4, eval_period=1)
    run(config)
    assert best() == 1
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    config.train.max_iter = 6
    trainer = Trainer(config)
    trainer.resume_or_load(True)

    class Look(HookBase):
        def after_step(self):
            seen.append(best())

    seen = []
    trainer.register_hooks([Look()])
    trainer.train()
    assert trainer.start_iter == 4 and seen == [1, 1] and best() == 5


def test_known_classes_and_an_unknown_best_are_named(data, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "do_test", lambda *_, **__: {"bbox": {"AP": 0.5}})
    model = distiller()
    model.classes, model.teacher.classes = NAMES, ["class 1", "x", "y"]
    run(recipe(data, tmp_path, model, max_iter=1, best_checkpoint="bbox/Ap"))
    log = (tmp_path / "log.txt").read_text()
    assert "AP is 0.50; it has 33% of the classes" in log
    assert "no bbox/Ap in the evaluation" in log
    assert "no evaluation had bbox/Ap: model_best.pth is the last state" in log
    assert saved(tmp_path / "model_best.pth")["iteration"] == 0
    assert not (tmp_path / "model_best.json").exists()


def test_how_often_it_is_evaluated_changes_nothing(data, tmp_path):
    for period in (0, 1):
        run(recipe(data, tmp_path / str(period), max_iter=3, eval_period=period))
    states = [saved(tmp_path / f"{period}/model_final.pth")["model"] for period in (0, 1)]
    assert_same(*states)


def test_bad_input(data, tmp_path):
    config = recipe(data, tmp_path / "out", clip_gradients={"clip_type": "hard"})
    with pytest.raises(InputError, match="clip_type: hard"):
        Trainer(config)
    with pytest.raises(InputError, match="no optimizer"):
        Trainer({"model": {}, "dataloader": {}, "train": {}})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize("student", [tiny_faster_rcnn, tiny_retinanet])
def test_a_student_has_the_classes_of_its_data(data, tmp_path, student, lazily):
    """One too few would be learned as background, one too many be found and fail the evaluation."""

    def refused(train, test, count, line):
        config = recipe(data, tmp_path / "out", student(classes=count))
        config.dataloader.train.dataset.names = train
        config.dataloader.test.dataset.names = config.dataloader.evaluator.dataset_name = test
        with pytest.raises(InputError, match=line):
            Trainer(config)
        assert not (tmp_path / "out").exists()

    whole = f"tiny_{data}"
    coco_dataset(whole, str(data / "data.json"), str(data))
    if lazily:  # Detectron2's own, whose names are known when it is loaded
        whole = f"lazily_{tmp_path}"
        register_coco_instances(whole, {}, str(data / "data.json"), str(data))
    for count in (CLASSES - 1, CLASSES + 1):
        line = f"num_classes: {count} of the student; expected {CLASSES}, as data set '{whole}'"
        refused(whole, whole, count, line)
    few = tmp_path / "few"
    draw_data(few)
    content = json.loads((few / "data.json").read_text())
    content |= {"annotations": [], "categories": content["categories"][:1]}
    (few / "data.json").write_text(json.dumps(content))
    name = coco_dataset(f"few_{tmp_path}", str(few / "data.json"), str(few))
    refused(whole, name, CLASSES, f"data set '{name}': no class 'class 1', 'class 2'; expected the")


def test_a_checkpoint_of_another_recipe_is_not_resumed(data, tmp_path):
    run(without_evaluation(recipe(data, tmp_path, max_iter=1)))
    other = without_evaluation(recipe(data, tmp_path, tiny_retinanet(), max_iter=2))
    line = "final.pth: .* is missing or of another shape; expected a"
    with pytest.raises(InputError, match=line):
        Trainer(other).resume_or_load(True)
    (tmp_path / "last_checkpoint").write_text("gone.pth")
    with pytest.raises(InputError, match="gone.pth: no such file"):
        Trainer(other).resume_or_load(True)


@pytest.mark.parametrize("kind", ["pth", "pkl"])
def test_weights_to_start_from_meet_the_student_alone(data, tmp_path, kind):
    source = build(tiny_faster_rcnn(), seed=9).state_dict()
    stem = "backbone.bottom_up.stem.conv1.weight"
    file = tmp_path / f"backbone.{kind}"
    if kind == "pth":
        torch.save({"model": {stem: source[stem]}}, file)
    else:  # as ImageNet weights come: names that match by their end, NumPy's arrays
        weights = {"stem.conv1.weight": source[stem].numpy()}
        content = {"model": weights, "__author__": "torchvision", "matching_heuristics": True}
        file.write_bytes(pickle.dumps(content))
    trainer = Trainer(recipe(data, tmp_path / "out", distiller(), init_checkpoint=str(file)))
    before = copy.deepcopy(dict(trainer.model.student.named_parameters()))
    trainer.resume_or_load(False)
    for name, found in trainer.model.student.named_parameters():
        assert found.equal(source[stem] if name == stem else before[name]), name


def test_what_a_student_inherits_is_the_teachers_whatever_it_starts_from(data, tmp_path):
    source = build(tiny_faster_rcnn(), seed=9).state_dict()
    torch.save({"model": source}, tmp_path / "student.pth")
    model = distiller()
    model.inherit = ["roi_heads.box_predictor."]
    start = str(tmp_path / "student.pth")
    trainer = Trainer(recipe(data, tmp_path / "out", model, init_checkpoint=start))
    trainer.resume_or_load(False)
    teacher = trainer.model.teacher.detector.state_dict()
    for key, value in trainer.model.student.state_dict().items():
        inherited = key.startswith("roi_heads.box_predictor.")
        assert_same(value, (teacher if inherited else source)[key])


def test_classes_named_otherwise_than_in_the_data(data, refuses):
    config = without_evaluation(recipe(data, "out", distiller()))
    names = [f"class {k}" for k in (1, 0, *range(2, CLASSES))]
    config.model.classes = config.model.teacher.classes = names
    line = "model.classes: class 0 is 'class 1'; expected 'class 0', as in the data"
    refuses(lambda: Trainer(config), line)


def test_one_evaluator_has_one_test_set(data, tmp_path):
    """It would compare the images of the second with its own, by their ids."""
    config = recipe(data, tmp_path / "out")
    other = coco_dataset(f"second_{tmp_path}", str(data / "data.json"), str(data))
    names = config.dataloader.test.dataset.names
    config.dataloader.test.dataset.names = [names, other]
    with pytest.raises(
        InputError, match="dataloader.test.dataset.names: 2 data sets, .*expected one"
    ):
        Trainer(config)
    del config.dataloader.evaluator
    Trainer(config)
