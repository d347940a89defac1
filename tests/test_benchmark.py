"""The benchmark: which work it measures, on which batches, and how precise the figures are."""

import contextlib
import itertools
import json
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.layers import FrozenBatchNorm2d
from detectron2.structures import Boxes
from detectron2.utils.events import get_event_storage
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from d2kd.benchmark import (
    DETECTRON2,
    DISTILLED,
    MAIN_RATIO,
    STUDENT,
    TEACHER,
    Bench,
    BenchmarkCase,
    costs,
)
from d2kd.benchmark.bench import BATCHES, peak_memory
from d2kd.benchmark.costs import max_relative_difference, median_interval, time_ratios, time_rows
from d2kd.benchmark.data_loading import measure_data_loading
from d2kd.benchmark.phases import PHASES, measure_phases
from d2kd.benchmark.step_cost import bootstrap_medians
from d2kd.benchmark.untrained import measure_norm_statistics, random_batch
from d2kd.modeling import capture
from d2kd.utils.errors import InputError
from d2kd.utils.memory import PeakMemory

from .common import ROOT, batch, build, command, refusal, tiny_faster_rcnn
from .tiny_run import draw_data

only_linux = pytest.mark.skipif(sys.platform != "linux", reason="no other system tells its peak")

RECIPE = """
from pathlib import Path

from detectron2.config import LazyCall as L

from d2kd.losses import DistillLosses, ImitationLoss, TARLoss
from tests.tiny_run import distiller, recipe

_here = Path(__file__).parent  # without data, and without the teacher's weights
globals().update(recipe(_here / "data", _here / "out", {model}, max_iter=4).items())
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


def setup_of(folder, name, *overrides, sizes=((64, 64),)):
    return BenchmarkCase(name, str(folder / f"{name}.py"), overrides, sizes, device="cpu")


def test_frozen_stages_get_statistics_and_stay_frozen():
    node = tiny_faster_rcnn()
    node.backbone.bottom_up.norm = "BN"
    detector = build(node)
    stem = detector.backbone.bottom_up.stem
    stem.freeze()
    assert isinstance(stem.conv1.norm, FrozenBatchNorm2d)
    examples = batch()
    measure_norm_statistics(detector.eval(), [examples] * 3)
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


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_benched_detectors_have_the_recipes_norms_with_statistics(folder, norm):
    def norms(detector):
        found = dict(detector.named_modules()).items()
        return {k: m for k, m in found if isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d)}

    setup = setup_of(folder, "imitation", f"model.student.backbone.bottom_up.norm={norm}")
    rows, built = Bench(setup).rows, instantiate(setup.recipe().model)
    student, teacher = (rows[name].modules[0] for name in (STUDENT, TEACHER))
    for detector, own in ((student, built.student), (teacher, built.teacher.detector)):
        found = norms(detector)
        assert {k: type(m) for k, m in found.items()} == {k: type(m) for k, m in norms(own).items()}
        assert all(m.running_mean.abs().max() > 0 for m in found.values())
    learning = [m for m in norms(student).values() if isinstance(m, nn.BatchNorm2d)]
    assert bool(learning) == (norm == "BN") and all(m.momentum == 0.1 for m in learning)
    assert student.training and not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("classes, masks", [(1, False), (3, True), (80, False)])
def test_batches_are_fixed_by_their_seed(classes, masks):
    head = SimpleNamespace(num_classes=classes, mask_on=masks)
    detector = SimpleNamespace(roi_heads=head) if masks else head
    one, same, other = (random_batch(detector, (96, 128), 2, seed) for seed in (0, 0, 1))
    for a, b, c in zip(one, same, other):
        assert torch.equal(a["image"], b["image"]) and not torch.equal(a["image"], c["image"])
        boxes = a["instances"].gt_boxes.tensor
        assert torch.equal(boxes, b["instances"].gt_boxes.tensor)
        assert a["image"].shape == (3, 96, 128) and a["instances"].image_size == (96, 128)
        assert (a["height"], a["width"]) == (96, 128)
        assert len(boxes) == 7 and (boxes >= 0).all()
        assert (boxes[:, 2:] <= torch.tensor([128, 96])).all()
        sides = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
        assert sides.min() > 0 and sides.max() > 8 * sides.min()
        found = set(a["instances"].gt_classes.tolist())
        assert {0, classes - 1} <= found <= set(range(classes))
        assert len(found) == min(classes, 7)
        assert a["instances"].has("gt_masks") == masks
        if masks:
            drawn = a["instances"].gt_masks.get_bounding_boxes().tensor
            assert torch.allclose(drawn, boxes, atol=1e-4)
    assert not torch.equal(one[0]["image"], one[1]["image"])


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
    assert len(one.teacher_reads) == BATCHES
    assert all(set(question.read) == read for question in one.teacher_reads)
    teacher = one.rows[TEACHER].modules[0]
    parts = {name: teacher.get_submodule(name) for name in (*runs, "proposal_generator")}
    counts = {}
    for name in (TEACHER, DISTILLED):
        with capture(parts) as calls:
            assert one.seconds(name, 1) > 0
        counts[name] = {part: len(received) for part, received in calls.items()}
    assert counts[TEACHER] == {**runs, "proposal_generator": 0}
    assert counts[TEACHER] == counts[DISTILLED]


def test_icd_needs_no_data_and_has_its_own_optimizer(monkeypatch):
    """The recipe's priors would be estimated from images that need not be there."""
    monkeypatch.delenv("D2KD_BCCD", raising=False)
    recipe = str(ROOT / "projects/ICD/configs/icd_bccd_retinanet.py")
    one = Bench(BenchmarkCase("icd", recipe, image_sizes=((64, 64),), device="cpu"))
    assert all(set(question.read) == {"images", "features"} for question in one.teacher_reads)
    model = one.rows[DISTILLED].modules[0]
    parts = {STUDENT: (model.student,), DISTILLED: (model.student, model.losses)}
    for name, moved in parts.items():
        before = {key: value.clone() for key, value in model.named_parameters()}
        assert one.seconds(name, 0) > 0
        changed = {key for key, value in model.named_parameters() if not value.equal(before[key])}
        for part in (model.student, model.losses):
            own = {id(p) for p in part.parameters()}
            own = {key for key, value in model.named_parameters() if id(value) in own}
            assert bool(own & changed) == (part in moved), name


@pytest.mark.parametrize("scale", [1, 2, 1.5])
def test_the_teacher_judges_the_students_regions(folder, scale):
    """At the same places of its images, also where these are larger; batches take the sizes in turn."""
    sizes = tuple(
        (int(height * scale), int(width * scale)) for height, width in ((64, 96), (96, 64))
    )
    one = Bench(setup_of(folder, "tar", f"model.teacher.scale={scale}", sizes=sizes))
    shown = [{tuple(x["image"].shape[-2:]) for x in batch} for batch in one.batches]
    assert shown == [{(64, 96)}, {(96, 64)}, {(64, 96)}, {(96, 64)}, {(64, 96)}]
    heads = {name: one.rows[name].modules[0].roi_heads for name in (STUDENT, TEACHER)}
    for number in range(BATCHES):
        boxes = {}
        for name, head in heads.items():
            with capture({"pooler": head.box_pooler}) as calls:
                one.seconds(name, number)
            boxes[name] = Boxes.cat(calls["pooler"][0][0][1]).tensor
        assert boxes[STUDENT].shape == boxes[TEACHER].shape
        # Other draws would choose others; the steps taken so far moved these by next to nothing.
        same = (boxes[STUDENT] - boxes[TEACHER] / scale).abs().amax(1) < 0.5
        assert same.float().mean() > 0.9


@pytest.mark.parametrize("choice", [True, False])
def test_convolutions_choose_their_algorithms_as_in_training(folder, monkeypatch, choice):
    """From the first on, those that the norms' statistics come from included."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not choice)
    chosen = []

    def measure(*arguments):
        chosen.append(torch.backends.cudnn.benchmark)
        measure_norm_statistics(*arguments)

    monkeypatch.setattr("d2kd.benchmark.bench.measure_norm_statistics", measure)
    Bench(setup_of(folder, "silent", f"train.cudnn_benchmark={choice}".lower()))
    assert chosen == [choice, choice] and torch.backends.cudnn.benchmark is choice


def test_every_step_starts_alike(bench):
    seen = []
    for _ in range(2):
        with bench("tar").at_half_progress():
            seen.append((torch.rand(3).tolist(), np.random.rand(), get_event_storage().iter))
    assert seen[0] == seen[1] and seen[0][2] == 2  # of 4


def test_rows_take_turns_on_the_same_batch():
    received, reported = [], []

    class Silent:
        def __init__(self, label, rows):
            self.label, self.rows = label, dict.fromkeys(rows)

        def seconds(self, name, number):
            received.append((self.label, name, number))
            return float((len(received) - 1) // 3)  # the round

    benches = {"a": Silent("a", [STUDENT, TEACHER]), "b": Silent("b", [TEACHER])}
    seconds = time_rows(benches, 4, lambda *steps: reported.append(steps))
    rows = [("a", STUDENT), ("a", TEACHER), ("b", TEACHER)]
    assert seconds == dict.fromkeys(rows, [3.0, 4.0, 5.0, 6.0])  # three to warm up
    rounds = [received[i : i + 3] for i in range(0, len(received), 3)]
    assert len(rounds) == 3 + 4
    for k, measured in enumerate(rounds):
        assert {(label, name) for label, name, _ in measured} == set(rows)
        assert {number for *_, number in measured} == {k % BATCHES}
    assert len({measured[0][:2] for measured in rounds[:3]}) == 3  # each was first
    assert reported == [(k, 7) for k in range(7)]


def test_detectron2s_step_is_ours(bench):
    """The same losses on the same batch, and then the same weights, but for the learning rate's size."""
    one = bench("silent")
    names = set(one.rows)
    assert names == {DETECTRON2, STUDENT, TEACHER, DISTILLED}
    student = one.rows[STUDENT].modules[0]
    before = {key: value.clone() for key, value in student.state_dict().items()}
    after = {}
    for name in (DETECTRON2, STUDENT):
        student.load_state_dict(before)
        optimizer = one.rows[name].trained[1]
        optimizer.state.clear()
        one.seconds(name, 2)
        after[name] = {key: value.clone() for key, value in student.state_dict().items()}
    assert any(not value.equal(before[key]) for key, value in after[DETECTRON2].items())
    assert all(value.equal(after[STUDENT][key]) for key, value in after[DETECTRON2].items())


def test_each_instant_counts_for_the_innermost_phase():
    def step():  # from 0
        with record_function("d2kd/losses"):  # from 1
            with record_function("d2kd/teacher.features"):  # from 2
                pass  # to 3
            with record_function("d2kd/student.images"), record_function("another's"):
                pass
            with record_function("d2kd/teacher.regions"):  # from 4
                pass  # to 5
        # to 6
        with pytest.raises(KeyError), record_function("d2kd/backward"):  # from 7
            raise KeyError
        # to 8
        with record_function("d2kd/forward"):  # from 9, where nothing is distilled
            pass

    # to 9, or to 11
    expected = {"student forward": 0.0, "losses": 3.0, "teacher": 2.0}
    expected |= {"backward": 1.0, "optimizer": 0.0, "rest": 3.0}
    ticks = itertools.count()
    for distilled in (True, False):
        if not distilled:
            expected |= {"student forward": 1.0, "rest": 4.0}
        assert measure_phases(step, distilled, ticks.__next__) == expected


def test_phases_make_up_the_step(bench):
    one = bench("tar")
    assert one.phases(TEACHER, 0) is one.phases(DETECTRON2, 0) is None
    for name, other in ((STUDENT, ("teacher", "losses")), (DISTILLED, ())):
        found = one.phases(name, 0)
        assert tuple(found) == PHASES
        for phase, seconds in found.items():
            assert (seconds > 0) == (phase not in other), (name, phase)


def test_a_profile_of_a_step_has_its_ranges(bench, monkeypatch):
    """Of any run, not of a benchmark alone."""
    monkeypatch.setenv("KINETO_LOG_LEVEL", "5")
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        bench("tar").seconds(DISTILLED, 0)
    names = {event.name for event in profiled.events()}
    parts = "forward", "student forward", "teacher.features", "teacher.regions", "losses"
    assert {f"d2kd/{part}" for part in (*parts, "backward")} <= names
    assert "Optimizer.step#SGD.step" in names


def test_a_recipes_own_loader_feeds_the_step(folder, bench, monkeypatch):
    draw_data(folder / "data")
    one, reported, shown = bench("imitation"), [], []
    model, optimizer = one.rows[DISTILLED].trained
    before = {key: value.clone() for key, value in model.state_dict().items()}
    forward = type(model).forward
    monkeypatch.setattr(
        type(model), "forward", lambda self, batch: shown.append(batch) or forward(self, batch)
    )
    found = measure_data_loading(
        one, batch_size=3, steps=2, progress=lambda *steps: reported.append(steps)
    )
    assert reported == [(k, 10) for k in range(10)]  # three and two, twice
    assert [len(batch) for batch in shown] == [3] * 5
    names = {image["file_name"] for batch in shown for image in batch}
    assert names == {str(folder / f"data/{k}.png") for k in range(6)}
    assert found["workers"] == 0
    assert 0 < found["waiting_seconds"] < found["median_seconds"]
    assert found["images_per_second"] == pytest.approx(3 / found["median_seconds"])
    assert found["loader_images_per_second"] > 0
    assert any(not value.equal(before[key]) for key, value in model.state_dict().items())


def test_the_interval_holds_95_of_100_resampled_medians():
    assert median_interval([1.5] * 9) == {"median": 1.5, "low": 1.5, "high": 1.5}
    values = np.random.default_rng(0).lognormal(size=200)
    found = median_interval(values)
    assert found["low"] <= found["median"] == np.median(values) <= found["high"]
    medians = bootstrap_medians(values, np.random.default_rng(7))
    held = (found["low"] <= medians) & (medians <= found["high"])
    assert held.mean() == pytest.approx(0.95, abs=0.01) and found == median_interval(values)


def test_ratios_are_taken_round_by_round():
    student, teacher = np.array([1.0, 2.0, 40.0]), np.array([0.5, 1.0, 20.0])
    whole = 1.1 * (student + teacher)
    own = {DETECTRON2: student / 1.25, STUDENT: student, TEACHER: teacher, DISTILLED: whole}
    seconds = {("a", row): list(values) for row, values in own.items()}
    seconds |= {("b", row): list(own[row] / 2) for row in (TEACHER, DISTILLED)}
    found = time_ratios(seconds, plain={"a": "a", "b": "a"}, variant_of={"b": "a"})
    names = MAIN_RATIO, "distilled / student", "teacher / student", "student / Detectron2's"
    expected = {("a", name): value for name, value in zip(names, (1.1, 1.65, 0.5, 1.25))}
    expected |= {("b", name): value for name, value in zip(names, (0.66, 0.825, 0.25, 1.25))}
    expected |= {("b", "distilled / that of a"): 0.5}
    expected |= {("b", "distilled / (student + teacher) of a"): 0.55}
    assert {(r["recipe"], r["ratio"]) for r in found} == set(expected)
    for ratio in found:
        interval = [ratio[key] for key in ("low", "median", "high")]
        assert interval == pytest.approx([expected[ratio["recipe"], ratio["ratio"]]] * 3)
    del seconds["a", DETECTRON2]
    left = time_ratios(seconds, plain={"a": "a"}, variant_of={})
    assert "student / Detectron2's" not in {r["ratio"] for r in left}


def test_losses_are_compared_by_their_size():
    found = max_relative_difference({"a": 2.0, "b": 1e-3}, {"a": 2.0, "b": 1.1e-3})
    assert found == pytest.approx(1 / 11)
    assert max_relative_difference({}, {}) == 0.0
    assert max_relative_difference({"a": 1.0}, {"b": 1.0}) == float("inf")


@only_linux
def test_growth_is_the_peak_and_not_the_rest():
    torch.ones(128 << 20, dtype=torch.uint8)  # an earlier peak, and a higher one
    peak = PeakMemory(torch.device("cpu"))
    torch.ones(64 << 20, dtype=torch.uint8)
    assert 60 << 20 < peak.growth < 80 << 20
    assert peak.bytes == peak.before + peak.growth


@only_linux
def test_memory_is_measured_in_another_process(folder):
    setup = setup_of(folder, "imitation")
    assert 0 < Bench(setup).rows[DISTILLED].weights < peak_memory(setup, DISTILLED)


def test_a_peak_has_each_size_of_images_with_the_optimizers_state(folder, monkeypatch):
    sizes = ((96, 64), (64, 64))
    one = Bench(setup_of(folder, "imitation", sizes=sizes))
    optimizer, seen = one.rows[DISTILLED].trained[1], []

    def seconds(name, number):
        seen.append((tuple(one.batches[number][0]["image"].shape[1:]), bool(optimizer.state)))
        return Bench.seconds(one, name, number)

    monkeypatch.setattr(one, "seconds", seconds)
    one.peak(DISTILLED)
    assert {size for size, has_state in seen if has_state} == set(sizes)


run = command("benchmark")


def test_table_and_json(folder, tmp_path, capsys, monkeypatch):
    requested, models = [], []

    class Watched(Bench):
        def __init__(self, setup):
            super().__init__(setup)
            models.append(weakref.ref(self.rows[DISTILLED].modules[0]))

    def peak(setup, name):
        assert not any(model() for model in models), "there are two of it in memory"
        requested.append((setup.label, name))
        return None if name == TEACHER else 3 * 2**20

    monkeypatch.setattr(costs, "Bench", Watched)
    monkeypatch.setattr(costs, "peak_memory", peak)
    words = ["--config-file", folder / "tar.py", "--config-file", folder / "silent.py"]
    words += "--image-size 64 --image-size 32x96 --device cpu --rounds 2 --data 2".split()
    words += ["--json", tmp_path / "new/result.json", "--markdown", tmp_path / "table.md"]
    draw_data(folder / "data")
    words += ["--variant", "fused", "model.teacher.fuse_norms=true"]
    words += ["--variant", "clipped", "train.clip_gradients.enabled=true"]
    run([*words, "--bound", "1e6", "train.max_iter=6"])
    printed = capsys.readouterr().out
    assert len(models) == 6 and printed.count("met") == 6 and "exceeded" not in printed
    result = json.loads((tmp_path / "new/result.json").read_text())
    assert result["schema"] == 2 and result["versions"]["torch"] == torch.__version__
    reported = [result[key] for key in ("device", "image_sizes", "batch_size", "rounds")]
    assert reported == ["cpu", [[64, 64], [32, 96]], 2, 2]
    assert "\n64 x 64, 32 x 96 px, 2 images per batch" in printed

    recipes = {recipe["label"]: recipe for recipe in result["recipes"]}
    labels = ["tar", "tar, fused", "tar, clipped", "silent", "silent, fused", "silent, clipped"]
    assert list(recipes) == labels
    assert recipes["tar"]["teacher_outputs"] == ["images", "features", "regions"]
    assert recipes["tar"]["difference"] is None and recipes["tar"]["losses"]
    for label in ("tar, fused", "tar, clipped"):
        assert 0 <= recipes[label]["difference"] < 0.05
    assert recipes["silent"]["teacher_outputs"] == []
    assert not any(recipes["silent"]["losses"].values())

    # The plain step is one for both recipes, and another where the student is trained otherwise.
    rows = [(row["recipe"], row["name"]) for row in result["rows"]]
    assert rows == requested
    assert [row[0] for row in rows if row[1] == DETECTRON2] == ["tar"]
    assert [row[0] for row in rows if row[1] == STUDENT] == ["tar", "tar, clipped"]
    for name in (TEACHER, DISTILLED):
        assert [row[0] for row in rows if row[1] == name] == labels
    for row in result["rows"]:
        assert row["peak_memory_mib"] == (None if row["name"] == TEACHER else 3)
        assert row["weights_mib"] > 0
        assert len(row["seconds"]) == 2 and row["median_seconds"] == np.median(row["seconds"])
        assert row["images_per_second"] == pytest.approx(2 / row["median_seconds"])
        assert min(row["seconds"]) > 0
        assert (row["phases"] is None) == (row["name"] in (TEACHER, DETECTRON2))
    assert [row["recipe"] for row in result["data"]] == labels
    assert printed.count("with its data loader") == 1
    compared = {(r["recipe"], r["ratio"]): r for r in result["ratios"]}
    assert ("tar, fused", "distilled / that of tar") in compared
    markdown = (tmp_path / "table.md").read_text()
    for ratio in result["ratios"]:
        assert ratio["ratio"] in printed and f"{ratio['median']:.3f}" in printed
        assert f"{ratio['median']:.3f}" in markdown
    assert "| recipe" in markdown

    monkeypatch.setattr("d2kd.benchmark.benchmark", lambda *_, **__: result)
    with pytest.raises(SystemExit, match="1"):
        run([*words, "--bound", "1e-6"])
    assert "bound 1e-06 exceeded" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--no-memory"], []], ids=["none wanted", "cut short"])
def test_what_is_known_is_kept_without_memory(folder, capsys, tmp_path, monkeypatch, words):
    def peak(setup, name):
        assert not words, "memory was measured"
        if name == STUDENT:
            raise KeyboardInterrupt
        return 3 * 2**20

    monkeypatch.setattr(costs, "peak_memory", peak)
    every = f"--config-file {folder / 'imitation.py'} --image-size 64 --rounds 1 --device cpu"
    every = [*every.split(), "--json", tmp_path / "result.json", *words]
    with contextlib.nullcontext() if words else pytest.raises(KeyboardInterrupt):
        run([*every, "--markdown", tmp_path / "table.md"])
    assert not words or "memory " not in capsys.readouterr().out
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [row["name"] for row in rows] == [DETECTRON2, STUDENT, TEACHER, DISTILLED]
    known = None if words else 3
    assert [row["peak_memory_mib"] for row in rows] == [known, None, None, None]
    assert all(row["median_seconds"] > 0 and row["weights_mib"] > 0 for row in rows)
    assert DISTILLED in (tmp_path / "table.md").read_text()


NOWHERE = "dataloader.train.dataset.names.image_root=. " + " ".join(
    f"dataloader.train.dataset.names.{key}=gone.json" for key in ("name", "json_file")
)
REFUSED = {
    "plain recipe": ("--config-file {folder}/plain.py", "plain.py: a plain recipe"),
    "missing recipe": ("--config-file {folder}/gone.py", "gone.py: no such config"),
    "unknown key": ("{tar} train.max_itr=3", "train.max_itr: no 'max_itr'"),
    "no rounds": ("{tar} --rounds 0", "rounds: 0"),
    "no steps": ("{tar} --data -1", "data steps: -1"),
    "no data": ("{tar} --rounds 1 --data 1 {nowhere}", "gone.json: no such file"),
    "no pixels": ("{tar} --image-size 0", "image size: 0"),
    "no size": ("{tar} --image-size 64x", "--image-size: 64x; expected pixels such as 512"),
    "too many sizes": ("{tar}" + 4 * " --image-size 64", "image sizes: 4; expected from 1 to 3"),
    "no images": ("{tar} --batch-size -1", "batch size: -1"),
    "one twice": ("{tar} {tar}", "label: 'tar' 2 times"),
    "device": ("{tar} --device abacus", "train.device: abacus"),
    "folder": ("{tar} --json {folder}", "is a folder"),
    "losses": ("{tar} model.losses.tar.feature_weight=1 model.losses.tar.levels=[p9]", "'p9'"),
}


@pytest.mark.parametrize("arguments, complaint", REFUSED.values(), ids=REFUSED.keys())
def test_refused_in_one_line(folder, capfd, arguments, complaint):
    tar = f"--config-file {folder}/tar.py"
    words = arguments.format(folder=folder, tar=tar, nowhere=NOWHERE).split()
    assert complaint in refusal(run, words, capfd)


def test_a_loss_that_is_not_finite(bench, monkeypatch):
    one = bench("imitation")
    loss = one.rows[DISTILLED].modules[0].losses.by_name["imitation"]
    monkeypatch.setattr(loss, "weight", float("inf"))
    with pytest.raises(InputError, match="distill/loss_imitation.*finite"):
        one.seconds(DISTILLED, 0)


def test_an_untrained_detector_that_explodes(folder, monkeypatch, refuses):
    def explode(*_):
        raise FloatingPointError("boxes are not finite")

    monkeypatch.setattr("d2kd.benchmark.bench.measure_norm_statistics", explode)
    line = "boxes are not finite; expected untrained detectors"
    refuses(lambda: Bench(setup_of(folder, "tar")), line)


def test_recipes_that_choose_algorithms_otherwise(folder, refuses):
    setups = [
        BenchmarkCase(x, str(folder / "tar.py"), (f"train.cudnn_benchmark={x}",))
        for x in ("true", "false")
    ]
    refuses(lambda: costs.benchmark(setups), "train.cudnn_benchmark: true and false; expected one")
