"""The benchmark measures what it says: which work, on which batches, and how sure it is."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.structures import Boxes
from detectron2.utils.events import get_event_storage
from omegaconf import OmegaConf
from torch import nn

from d2kd import benchmark
from d2kd.benchmark import (
    BATCHES,
    DISTILLED,
    HEADLINE,
    STUDENT,
    TEACHER,
    Bench,
    Setup,
    draw_batch,
    growth,
    measure_statistics,
    median_interval,
    peak_memory,
    ratios,
    thaw_norms,
)
from d2kd.config import load
from d2kd.errors import InputError
from d2kd.modeling import capture

from .common import batch, build, tiny_faster_rcnn

ROOT = Path(__file__).parent.parent
RECIPE = """
from pathlib import Path

from detectron2.config import LazyCall as L

from d2kd.losses import DistillLosses, ImitationLoss, TARLoss
from tests.tiny_run import distiller, recipe

_here = Path(__file__).parent  # without data, and without the teacher's weights
_cfg = recipe(_here / "data", _here / "out", {model}, max_iter=4)
model, dataloader, optimizer, lr_multiplier, train = (
    _cfg.model, _cfg.dataloader, _cfg.optimizer, _cfg.lr_multiplier, _cfg.train
)
"""
MODELS = {
    "plain": "None",
    "imitation": "distiller('gone.pth', L(DistillLosses)(imitation=L(ImitationLoss)()))",
    "tar": "distiller('gone.pth', L(DistillLosses)(tar=L(TARLoss)()))",
    "silent": "distiller('gone.pth')",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    for name, model in MODELS.items():
        (folder / f"{name}.py").write_text(RECIPE.format(model=model))
    return folder


@pytest.fixture(scope="module")
def bench(folder):
    """Benches by the recipe's name, each built once."""
    built = {}

    def get(name: str) -> Bench:
        if name not in built:
            built[name] = Bench(setup_of(folder, name))
        return built[name]

    return get


def setup_of(folder, name):
    return Setup(str(folder / f"{name}.py"), image_size=64, device="cpu")


def norms_named(node):
    """Every value of a key "norm" in a node, whatever its case."""
    if OmegaConf.is_list(node):
        return [norm for value in node for norm in norms_named(value)]
    if not OmegaConf.is_dict(node):
        return []
    own = [node[key] for key in node if str(key).lower() == "norm"]
    return own + [norm for value in node.values() for norm in norms_named(value)]


def test_frozen_norms_are_thawed_in_lazy_and_yacs_nodes():
    model = load(str(ROOT / "projects/TAR/configs/tar_faster_rcnn_R_50_from_R_101_1x.py")).model
    model.student.backbone.norm = "GN"
    before = norms_named(model)
    thaw_norms(model)
    after = norms_named(model)
    assert (
        before.count("FrozenBN") >= 3
    )  # the student's stem and stages, and the teacher's yacs key
    assert after == ["BN" if norm == "FrozenBN" else norm for norm in before]
    assert "GN" in after


def test_frozen_stages_get_statistics_and_stay_frozen():
    node = tiny_faster_rcnn()
    thaw_norms(node)
    detector = build(node)
    stem = detector.backbone.bottom_up.stem
    stem.freeze()
    assert isinstance(stem.conv1.norm, FrozenBatchNorm2d)
    examples = batch()
    measure_statistics(detector.eval(), [examples] * 3)
    assert isinstance(stem.conv1.norm, FrozenBatchNorm2d)
    assert not detector.training and not any(p.requires_grad for p in stem.parameters())
    # A norm that has the statistics of a batch brings its channels to mean 0 and variance 1, live or frozen.
    channels = {}

    def look(norm, _, out):
        channels[norm] = out.transpose(0, 1).flatten(1).clone()  # what follows works in place

    res5 = detector.backbone.bottom_up.res5[0]
    for norm in (stem.conv1.norm, res5.conv2.norm):
        norm.register_forward_hook(look)
    with torch.no_grad():
        detector(examples)
    assert len(channels) == 2
    for norm, values in channels.items():
        # Deeper maps are small, and running variances unbiased.
        assert values.mean(1).abs().max() < 0.15, norm
        assert ((values.var(1) - 1).abs() < 0.25).all(), (norm, values.var(1))


def test_benched_detectors_have_live_norms_with_statistics(bench):
    student, teacher = (bench("imitation").rows[name].modules[0] for name in (STUDENT, TEACHER))
    for detector in (student, teacher):
        norms = [m for m in detector.modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms and not any(isinstance(m, FrozenBatchNorm2d) for m in detector.modules())
        assert all(norm.running_mean.abs().max() > 0 for norm in norms)
        assert all(norm.momentum == 0.1 for norm in norms)
    assert student.training and not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("classes", [1, 3, 80])
def test_batches_are_fixed_by_their_seed(classes):
    detector = SimpleNamespace(num_classes=classes)
    one, same, other = (draw_batch(detector, 96, 2, seed) for seed in (0, 0, 1))
    for a, b, c in zip(one, same, other):
        assert torch.equal(a["image"], b["image"]) and not torch.equal(a["image"], c["image"])
        boxes = a["instances"].gt_boxes.tensor
        assert torch.equal(boxes, b["instances"].gt_boxes.tensor)
        assert len(boxes) == 7 and (boxes >= 0).all() and (boxes <= 96).all()
        sides = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
        assert sides.min() > 0 and sides.max() > 8 * sides.min()
        found = set(a["instances"].gt_classes.tolist())
        assert {0, classes - 1} <= found <= set(range(classes))
        assert len(found) == min(classes, 7)
        assert not a["instances"].has("gt_masks")
    assert not torch.equal(one[0]["image"], one[1]["image"])


def test_a_mask_head_gets_masks():
    detector = SimpleNamespace(roi_heads=SimpleNamespace(num_classes=3, mask_on=True))
    for example in draw_batch(detector, 64, 2, seed=0):
        instances = example["instances"]
        boxes = instances.gt_masks.get_bounding_boxes().tensor
        assert torch.allclose(boxes, instances.gt_boxes.tensor, atol=1e-4)


@pytest.mark.parametrize(
    "recipe, read, runs",
    [
        ("imitation", {"images", "features"}, {"backbone": 1, "roi_heads.box_head": 0}),
        ("tar", {"images", "features", "regions"}, {"backbone": 1, "roi_heads.box_head": 1}),
        ("silent", set(), {"backbone": 0, "roi_heads.box_head": 0}),
    ],
)
def test_the_teachers_part_is_what_the_losses_read(bench, recipe, read, runs):
    one = bench(recipe)
    assert len(one.questions) == BATCHES
    assert all(set(question.read) == read for question in one.questions)
    teacher = one.rows[TEACHER].modules[0]
    parts = {name: teacher.get_submodule(name) for name in (*runs, "proposal_generator")}
    counts = {}
    for name in (TEACHER, DISTILLED):
        with capture(parts) as calls:
            assert one.seconds(name, 1) > 0
        counts[name] = {part: len(heard) for part, heard in calls.items()}
    assert counts[TEACHER] == {**runs, "proposal_generator": 0}
    assert counts[TEACHER] == counts[DISTILLED]


def test_icd_needs_no_data_and_has_its_own_optimizer(monkeypatch):
    """The recipe's priors would be estimated from images that need not be there."""
    monkeypatch.delenv("D2KD_BCCD", raising=False)
    recipe = str(ROOT / "projects/ICD/configs/icd_bccd_retinanet.py")
    one = Bench(Setup(recipe, image_size=64, device="cpu"))
    assert all(set(question.read) == {"images", "features"} for question in one.questions)
    model = one.rows[DISTILLED].modules[0]
    parts = {STUDENT: (model.student,), DISTILLED: (model.student, model.losses)}
    for name, moved in parts.items():
        before = {key: value.clone() for key, value in model.named_parameters()}
        assert one.seconds(name, 0) > 0
        changed = {key for key, value in model.named_parameters() if not value.equal(before[key])}
        for part in (model.student, model.losses):
            own = {key for key, value in model.named_parameters() if any(value is p for p in part.parameters())}  # fmt: skip
            assert bool(own & changed) == (part in moved), name


def test_the_teacher_judges_the_students_regions(bench):
    one = bench("tar")
    heads = {name: one.rows[name].modules[0].roi_heads for name in (STUDENT, TEACHER)}
    for number in range(BATCHES):
        boxes = {}
        for name, head in heads.items():
            with capture({"pooler": head.box_pooler}) as calls:
                one.seconds(name, number)
            boxes[name] = Boxes.cat(calls["pooler"][0][0][1]).tensor
        assert boxes[STUDENT].shape == boxes[TEACHER].shape
        # Other draws would choose others; the steps taken so far moved these by next to nothing.
        same = (boxes[STUDENT] - boxes[TEACHER]).abs().amax(1) < 0.5
        assert same.float().mean() > 0.9


def test_every_step_starts_alike(bench):
    seen = []
    for _ in range(2):
        with bench("tar")._half_way():
            seen.append((torch.rand(3).tolist(), np.random.rand(), get_event_storage().iter))
    assert seen[0] == seen[1]
    assert seen[0][2] == 2  # of 4


def test_rows_take_turns_on_the_same_batch(bench):
    one, heard, told = bench("silent"), [], []
    real, one.seconds = one.seconds, lambda name, number: heard.append((name, number)) or 1.0
    try:
        seconds = one.measure(4, lambda *steps: told.append(steps))
    finally:
        one.seconds = real
    rounds = [heard[i : i + 3] for i in range(0, len(heard), 3)]
    assert [len(values) for values in seconds.values()] == [4, 4, 4] and len(rounds) == 3 + 4
    for k, measured in enumerate(rounds):
        assert {name for name, _ in measured} == {STUDENT, TEACHER, DISTILLED}
        assert {number for _, number in measured} == {k % BATCHES}
    assert len({measured[0][0] for measured in rounds[:3]}) == 3  # each was first
    assert told == [(k, 7) for k in range(7)]


def test_the_interval_covers_the_median():
    assert median_interval([1.5] * 9) == {"median": 1.5, "low": 1.5, "high": 1.5}
    assert median_interval([2.0]) == {"median": 2.0, "low": 2.0, "high": 2.0}
    random = np.random.default_rng(0)
    widths = []
    for count in (3, 15, 400):
        values = random.lognormal(size=count)
        interval = median_interval(values)
        assert values.min() <= interval["low"] <= interval["median"] <= interval["high"]
        assert interval["high"] <= values.max() and interval["median"] == np.median(values)
        assert interval == median_interval(values)
        widths.append(interval["high"] - interval["low"])
    assert widths[2] < widths[1]


def test_the_interval_is_one_of_95_percent():
    """It covers the true median of a normal distribution about 95 times in 100."""
    random = np.random.default_rng(0)
    intervals = [median_interval(random.normal(size=15), draws=1000) for _ in range(200)]
    covered = np.mean([i["low"] <= 0 <= i["high"] for i in intervals])
    assert 0.9 < covered < 0.99


def test_ratios_are_taken_round_by_round():
    student, teacher = np.array([1.0, 2.0, 40.0]), np.array([0.5, 1.0, 20.0])
    found = ratios({STUDENT: student, TEACHER: teacher, DISTILLED: 1.1 * (student + teacher)})
    expected = {HEADLINE: 1.1, "teacher / student": 0.5, "distilled / student": 1.65}
    for name, value in expected.items():
        assert list(found[name].values()) == pytest.approx([value] * 3)


def test_growth_is_the_peak_and_not_the_rest():
    def peaks():
        torch.ones(64 << 20, dtype=torch.uint8)

    torch.ones(128 << 20, dtype=torch.uint8)  # an earlier peak, and a higher one
    grown = growth(peaks)
    if grown is None:
        pytest.skip("this system does not tell")
    assert 60 << 20 < grown < 80 << 20


def test_memory_is_measured_in_another_process(folder):
    weights, peak = peak_memory(setup_of(folder, "imitation"), DISTILLED)
    assert weights > 0
    assert peak is None or peak > weights


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("benchmark_tool", ROOT / "tools/benchmark.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_table_and_json(tool, folder, tmp_path, capsys, monkeypatch):
    peaks = {STUDENT: (2**20, 3 * 2**20), TEACHER: (2**20, None), DISTILLED: (2**21, 2**23)}
    monkeypatch.setattr(benchmark, "peak_memory", lambda setup, name: peaks[name])
    words = ["--config-file", str(folder / "tar.py"), "--image-size", "64", "--device", "cpu"]
    words += ["--rounds", "2", "--json", str(tmp_path / "new/result.json")]
    tool.main([*words, "--bound", "1e6", "model.losses.tar.regression_weight=0.0"])
    said = capsys.readouterr().out
    assert "asked of the teacher: images, features, regions" in said
    assert "met" in said and "exceeded" not in said
    result = json.loads((tmp_path / "new/result.json").read_text())
    assert result["schema"] == 1 and result["versions"]["torch"] == torch.__version__
    told = [result[key] for key in ("device", "image_size", "batch_size", "rounds")]
    assert told == ["cpu", 64, 2, 2]
    assert [row["name"] for row in result["rows"]] == [STUDENT, TEACHER, DISTILLED]
    assert [row["peak_memory_mib"] for row in result["rows"]] == [3, None, 8]
    for row in result["rows"]:
        assert row["name"] in said
        assert len(row["seconds"]) == 2 and row["median_seconds"] == np.median(row["seconds"])
        assert min(row["seconds"]) > 0
    assert result["ratios"] == ratios({row["name"]: row["seconds"] for row in result["rows"]})
    for name, interval in result["ratios"].items():
        assert name in said and f"{interval['median']:.3f}" in said

    monkeypatch.setattr(benchmark, "benchmark", lambda *_: result)
    with pytest.raises(SystemExit, match="1"):
        tool.main([*words, "--bound", "1e-6"])
    assert "bound 1e-06 exceeded" in capsys.readouterr().out


REFUSED = {
    "plain recipe": ("--config-file {folder}/plain.py", "plain.py: a plain recipe"),
    "missing recipe": ("--config-file {folder}/gone.py", "gone.py: no such config"),
    "unknown key": ("{tar} train.max_itr=3", "train.max_itr: no 'max_itr'"),
    "no rounds": ("{tar} --rounds 0", "rounds: 0"),
    "no pixels": ("{tar} --image-size 0", "image size: 0"),
    "no images": ("{tar} --batch-size -1", "batch size: -1"),
    "device": ("{tar} --device abacus", "train.device: abacus"),
    "folder": ("{tar} --json {folder}", "is a folder"),
    "losses": ("{tar} model.losses.tar.feature_weight=1 model.losses.tar.levels=[p9]", "'p9'"),
}


@pytest.mark.parametrize("arguments, complaint", REFUSED.values(), ids=REFUSED.keys())
def test_refused_in_one_line(tool, folder, capfd, arguments, complaint):
    words = arguments.format(folder=folder, tar=f"--config-file {folder}/tar.py").split()
    with pytest.raises(SystemExit) as exit:
        tool.main(words)
    assert exit.value.code == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert complaint in error


def test_a_loss_that_is_not_finite(bench, monkeypatch):
    one = bench("imitation")
    loss = one.rows[DISTILLED].modules[0].losses.by_name["imitation"]
    monkeypatch.setattr(loss, "weight", float("inf"))
    with pytest.raises(InputError, match="distill/loss_imitation.*finite"):
        one.seconds(DISTILLED, 0)
