"""Studies: what is planned, what is trained again and what is not, and the figures."""

import io
import json
import logging
import math
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig
from detectron2.data import DatasetCatalog
from omegaconf import OmegaConf
from PIL import Image

from d2kd.config import Recipe
from d2kd.data import check_dataset, shapes
from d2kd.engine import Trainer
from d2kd.study import (
    SequentialRunner,
    TrainingResult,
    build_study,
    load_and_plan,
    load_study,
    prepare_recipe,
    run_study,
    train,
    write_tables_and_plots,
)
from d2kd.study.results import (
    ap_metrics,
    compute_gains,
    format_results,
    format_training_time,
    provenance_table,
    write_results,
)
from d2kd.study.text import format_markdown_table, format_text_table, t_interval
from d2kd.utils.console import ProgressBar, suppress_output
from d2kd.utils.errors import InputError
from d2kd.utils.memory import PeakMemory

from . import common
from .common import ROOT, command, interrupted_in
from .test_voc import BLOOD, CELLS, write_voc
from .tiny_run import draw_data
from .tiny_run import recipe as tiny_recipe

CLASSES = list(shapes.CLASSES)


few_shapes = common.few_shapes(train=2, val=2, test=3)


def recipe(steps=100, **model):
    return dict(
        model=dict(width=8, max_iter="${train.max_iter}", **model),
        optimizer=dict(lr=0.1),
        train=dict(max_iter=steps),
    )


def study_of(**study):
    runs = dict(
        tar=dict(config=recipe(teacher=dict(weights="")), teacher="teacher"),
        teacher=dict(config=recipe(), shared_across_seeds=True),
        baseline=dict(config=recipe()),
        equal_time=dict(config=recipe(), match_time_of="tar"),
        longer=dict(config=recipe(), init_from="baseline"),
        term=dict(config=recipe(), optional=True),
    )
    defaults = dict(test="shapes_test", baseline="baseline", compare=["equal_time"], featured="tar")
    return build_study(
        OmegaConf.create(dict(study=defaults | study, runs=runs), flags={"allow_objects": True})
    )


class FakeTraining:
    """Trains at once: AP, or those of classes, by run or method; ``stop`` names a run to be interrupted in."""

    def __init__(self, ap=None):
        self.ap, self.calls, self.configs, self.tests = ap or {}, [], {}, {}
        self.stop, self.error = None, KeyboardInterrupt()

    def __call__(self, config, test, report):
        folder, steps = Path(config.train.output_dir), config.train.max_iter
        name, weights = folder.name, folder / "model_final.pth"
        self.calls.append(name)
        self.configs[name], self.tests[name] = config, test
        report(0, steps)
        with open(folder / "metrics.json", "a") as file:
            file.write('{"iteration": 0, "loss_cls": 1.0}\n')
        if name == self.stop:
            raise self.error
        report(steps, steps)
        weights.write_text(f"{name} {config.model} {steps}")
        ap = self.ap.get(name, self.ap.get(name.split("_seed")[0], 10.0))
        known = ap if isinstance(ap, list) else [ap] * (len(CLASSES) - 1)
        ap = sum(known) / len(known)
        metrics = {"AP": ap, "AP50": ap, "AP75": ap, "APs": -1, "APm": ap, "APl": math.nan}
        metrics |= {f"AP-{name}": ap for name, ap in zip(CLASSES, known)}
        return TrainingResult(metrics, 1234, 50.0, weights)


class FakeCost:
    """What a distilled step costs, at once."""

    def __init__(self, ratio=1.5):
        self.ratio, self.calls = ratio, []

    def __call__(self, distilled, plain, report):
        self.calls.append((distilled, plain))
        report(15, 15)
        found = dict(ratio=self.ratio, low=self.ratio - 0.1, high=self.ratio + 0.1)
        return found | dict(pairs=12, clock="cpu seconds")


def run(study, output, train, seeds=(), only=(), cost=None):
    console, trainer = io.StringIO(), SequentialRunner(train, cost or FakeCost())
    rows, failed = run_study(study, study.plan(seeds, only), output, trainer, console)
    return rows, failed, console.getvalue()


def test_plan_goes_by_need_and_seed():
    names = [run.name for run in study_of().plan(seeds=[0, 3])]
    one = ["tar_seed{0}", "baseline_seed{0}", "equal_time_seed{0}", "longer_seed{0}"]
    assert names == ["teacher", *[n.format(0) for n in one], *[n.format(3) for n in one]]
    study = study_of(seeds=[5])
    assert [run.name for run in study.plan(only=["term"])] == ["term_seed5"]
    assert [run.name for run in study.plan(only=["equal_time"])] == ["teacher", "equal_time_seed5"]
    assert [run.seed for run in study.plan(only=["tar"])] == [0, 5]


def test_recipes_may_be_what_distill_returns(tmp_path):
    made = Recipe.from_config(dict(recipe(7), dataloader={}, lr_multiplier={}))
    (tmp_path / "study.py").write_text(
        "from tests.test_study import recipe\nfrom d2kd.config import Recipe\n"
        "_made = Recipe.from_config(dict(recipe(7), dataloader={}, lr_multiplier={}))\n"
        "runs = dict(a=dict(config=_made), b=dict(config=_made._asdict()))\n"
        "study = dict(test='shapes_test', baseline='a')\n"
    )
    study = load_study(tmp_path / "study.py")
    about = dict(test="shapes_test", baseline="a")
    same = build_study(dict(study=about, runs=dict(a=dict(config=made))))
    a, b = study.plan(seeds=[0])
    assert a.config == b.config == same.plan(seeds=[0])[0].config
    assert a.config.model.max_iter == 7


def test_recipes_are_their_own_roots_and_take_overrides():
    study = study_of(fast=["train.max_iter=7"])
    plain, fast = study.plan(only=["baseline"]), study.plan(only=["baseline"], fast=True)
    assert plain[0].config.model.max_iter == 100 and fast[0].config.model.max_iter == 7
    with pytest.raises(InputError, match=r"train.max_iter: \[7; expected an integer"):
        study_of(fast=["train.max_iter=[7"]).plan(fast=True)
    with pytest.raises(InputError, match="no 'max_itr' in train"):
        study_of(fast=["train.max_itr=7"]).plan(fast=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(study=dict(tset="x")), "unknown 'tset'; expected one of test, baseline"),
        (dict(study=dict(baseline="bose")), "unknown 'bose'; expected one of tar, teacher"),
        (dict(study=dict(featured="bose")), "unknown 'bose'"),
        (dict(runs=dict(tar=dict(teacher="x"))), "runs.tar.teacher: unknown 'x'"),
        (dict(runs=dict(tar=dict(steps="x"))), "runs.tar: unknown 'steps'"),
        (dict(runs=dict(tar=dict(config=None))), "runs.tar: no config"),
        (dict(runs={"a/b": dict(config={"a": 1})}), "runs.a/b: 'a/b'; expected a name that a"),
        (dict(runs={"..": dict(config={"a": 1})}), "runs...: '..'; expected a name that a"),
        (dict(runs={"": dict(config={"a": 1})}), "runs.: ''; expected a name that a"),
        (dict(runs=dict(teacher=dict(init_from="tar"))), "teacher.init_from: tar is made per seed"),
        (
            dict(runs=dict(equal_time=dict(match_time_of="term"))),
            "equal_time.match_time_of: term has no teacher; expected a dis",
        ),
    ],
)
def test_mistakes_are_named(change, message):
    study = study_of()
    given = dict(study=dict(test="t", baseline="baseline"), runs=dict(study.runs))
    config = OmegaConf.merge(OmegaConf.create(given, flags={"allow_objects": True}), change)
    with pytest.raises(InputError, match=message):
        build_study(config)


def test_circles_unknown_methods_and_missing_test_data_are_named():
    study = study_of()
    study.runs["baseline"].init_from = "longer"
    with pytest.raises(InputError, match="runs: longer needs baseline needs longer"):
        study.plan(only=["longer"])
    with pytest.raises(InputError, match="runs: unknown 'tra'; expected one of tar"):
        study.plan(only=["tra"])
    with pytest.raises(InputError, match="no 'test'; expected test=<data set>, baseline=<method>"):
        build_study({"study": {}, "runs": {}})


def test_files_that_are_no_study(tmp_path):
    with pytest.raises(InputError, match="absent.py: no such config"):
        load_study(tmp_path / "absent.py")
    for text, message in (
        ("x = 1", "no dict named 'study'"),
        ("1 / 0", r"does not load \(ZeroDivisionError: .*\); expected a study"),
    ):
        (tmp_path / "s.py").write_text(text)
        with pytest.raises(InputError, match=f"s.py: {message}"):
            load_study(tmp_path / "s.py")


def test_runs_have_their_sources_and_equal_time_is_measured_once(tmp_path):
    train, cost = FakeTraining(), FakeCost(1.508)
    rows, failed, printed = run(study_of(), tmp_path, train, seeds=[0, 1], cost=cost)
    methods = ["tar", "teacher", "baseline", "equal_time", "longer"]
    assert not failed and list(dict.fromkeys(row["method"] for row in rows)) == methods
    teacher, configs = str(tmp_path / "teacher/model_final.pth"), train.configs
    assert configs["tar_seed0"].model.teacher.weights == teacher
    start = str(tmp_path / "baseline_seed0/model_final.pth")
    assert configs["longer_seed0"].train.init_checkpoint == start
    assert configs["equal_time_seed0"].train.max_iter == 151
    assert configs["equal_time_seed0"].model.max_iter == 151
    [(distilled, plain)] = cost.calls  # for both seeds
    assert distilled.model.teacher.weights == teacher
    assert "teacher" not in plain.model and plain.train.max_iter == 100
    assert printed.count("1.51 (1.41 to 1.61) times a plain step, measured over 12 pairs") == 1
    measured = cost(None, None, lambda *_: None)
    written = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["step_cost"] for row in written if row["method"] == "equal_time"] == [measured] * 2
    assert {row["step_cost"] for row in written if row["method"] != "equal_time"} == {None}
    # A machine that is slower in another way tomorrow makes no other run of it.
    train.calls.clear()
    cost.calls.clear()
    cost.ratio = 9.0
    again, _, _ = run(study_of(), tmp_path, train, seeds=[0, 1], cost=cost)
    assert train.calls == cost.calls == [] and again == rows
    shown = "equal_time: 1.51 (1.41 to 1.61) times the steps of baseline, measured over 12 pairs"
    assert shown in write_tables_and_plots(tmp_path, study_of(pictures=0), [], rows)
    assert shown in (tmp_path / "table.md").read_text()
    # Another teacher, another student and another cost.
    other = study_of()
    other.runs["teacher"].config.model.width = 16
    run(other, tmp_path, train, seeds=[0], only=["tar", "baseline", "equal_time"], cost=cost)
    assert train.calls == ["teacher", "tar_seed0", "equal_time_seed0"] and len(cost.calls) == 1
    assert train.configs["equal_time_seed0"].train.max_iter == 900
    assert (tmp_path / "teacher.old1" / "model_final.pth").is_file()
    assert (tmp_path / "equal_time_seed0.old1" / "model_final.pth").is_file()


def test_an_equal_time_run_whose_steps_cannot_be_measured_fails_alone(tmp_path):
    def refuse(distilled, plain, report):
        raise InputError("train.device", "cuda", "cpu")

    rows, failed, printed = run(study_of(), tmp_path, FakeTraining(), cost=refuse)
    assert list(failed) == ["equal_time_seed0"] and len(rows) == 4
    assert printed.count("failed: train.device: cuda; expected cpu") == 1


def test_results_have_the_promised_form(tmp_path):
    train = FakeTraining(ap=dict(tar=15.0, equal_time=math.nan))
    run(study_of(), tmp_path, train, seeds=[0, 1])
    results = json.loads((tmp_path / "results.json").read_text())
    about = ["dataset", "baseline", "featured"]
    assert list(results) == ["schema", "command", "versions", *about, "rows", "summary"]
    assert [results[key] for key in about] == ["shapes_test", "baseline", "tar"]
    assert results["schema"] == 1
    row = next(row for row in results["rows"] if row["name"] == "tar_seed1")
    keys = "name method seed AP AP50 AP75 APs APm APl per_class parameters seconds config weights"
    keys += " weights_sha256 teacher_sha256 log peak_memory_mib step_cost train_images"
    keys += " pseudo_labelled_images"
    assert list(row) == keys.split()
    assert row["AP"] == 15.0 and row["APs"] is None and row["APl"] is None
    assert row["per_class"] == {name: 15.0 for name in CLASSES[:-1]} | {CLASSES[-1]: None}
    gained = {"mean_gain": 5.0, "std_gain": 0.0, "interval": [5.0, 5.0], "gains": [5.0, 5.0]}
    assert results["summary"]["tar"] == gained
    undefined = dict.fromkeys(("mean_gain", "std_gain", "interval")) | {"gains": [None, None]}
    assert results["summary"]["equal_time"] == undefined
    assert set(results["summary"]) == {"tar", "equal_time", "longer"}
    over = json.loads((tmp_path / "gains.json").read_text())
    assert over["schema"] == 1
    assert {(r["method"], r["reference"]) for r in over["rows"]} >= {("tar", "equal_time")}


def test_finished_runs_are_not_trained_again_even_elsewhere(tmp_path):
    train = FakeTraining()
    first, _, _ = run(study_of(), tmp_path / "a", train)
    (tmp_path / "a").rename(tmp_path / "b")
    train.calls.clear()
    rows, _, printed = run(study_of(), tmp_path / "b", train)
    assert train.calls == [] and printed.count("finished before") == 5
    assert [row["AP"] for row in rows] == [row["AP"] for row in first]
    assert all(str(tmp_path / "b") in row["weights"] for row in rows)


def test_an_interrupted_study_continues(tmp_path):
    train = FakeTraining()
    train.stop = "baseline_seed0"
    with pytest.raises(KeyboardInterrupt):
        run(study_of(), tmp_path, train)
    written = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {row["name"] for row in written} == {"teacher", "tar_seed0"}
    train.stop = None
    train.calls.clear()
    run(study_of(), tmp_path, train)
    assert train.calls == ["baseline_seed0", "equal_time_seed0", "longer_seed0"]
    # It went on in its own folder: what it had written before is still there.
    assert len((tmp_path / "baseline_seed0" / "metrics.json").read_text().splitlines()) == 2


def test_several_commands_add_up_to_one_table(tmp_path):
    """Rows of other methods are kept while they are the study's own: same seeds, recipe and sources."""
    train = FakeTraining()
    run(study_of(), tmp_path, train, seeds=[0, 1], only=["tar", "baseline", "equal_time", "term"])
    train.calls.clear()

    def again(study, only):
        runs, every = study.plan([0], only), study.plan([0], list(study.runs))
        console, trainer = io.StringIO(), SequentialRunner(train, FakeCost())
        rows, failed = run_study(study, runs, tmp_path, trainer, console, every)
        assert not failed
        written = json.loads((tmp_path / "results.json").read_text())["rows"]
        assert [row["name"] for row in rows] == [row["name"] for row in written]
        return [row["name"] for row in rows], console.getvalue()

    found, printed = again(study_of(), ["longer"])
    assert train.calls == ["longer_seed0"]
    first = ["tar_seed0", "teacher", "baseline_seed0", "equal_time_seed0"]
    assert found == [*first, "longer_seed0", "term_seed0"]
    assert printed.count("finished before") == 5

    other = study_of()
    # And so TAR's, and that of its steps, are no longer its own.
    other.runs["teacher"].config.model.width = 16
    found, printed = again(other, ["baseline"])
    assert found == ["baseline_seed0", "longer_seed0", "term_seed0"]
    assert "left out" not in printed and "teacher" not in printed
    assert (tmp_path / "teacher" / "model_final.pth").is_file()  # nor is it moved aside

    train.stop = "longer_seed0"
    other.runs["longer"].config.model.width = 16
    with pytest.raises(KeyboardInterrupt):
        again(other, ["longer"])
    written = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["name"] for row in written] == ["baseline_seed0", "term_seed0"]


@pytest.mark.parametrize("harm", ["weights", "record"])
def test_a_result_that_is_not_whole_does_not_count(tmp_path, harm):
    train = FakeTraining()
    run(study_of(), tmp_path, train, only=["baseline"])
    file = {"weights": "model_final.pth", "record": "study.json"}[harm]
    (tmp_path / "baseline_seed0" / file).write_text("{")
    train.calls.clear()
    run(study_of(), tmp_path, train, only=["baseline"])
    assert train.calls == ["baseline_seed0"]


def test_a_failing_run_takes_along_only_what_needs_it(tmp_path):
    train = FakeTraining()
    train.stop, train.error = "teacher", InputError("loss_cls", "nan", "a finite number")
    rows, failed, printed = run(study_of(), tmp_path, train)
    assert [row["name"] for row in rows] == ["baseline_seed0", "longer_seed0"]
    assert list(failed) == ["teacher"]
    assert (
        "failed: loss_cls: nan" in printed and printed.count("skipped, since it needs teacher") == 2
    )
    printed = write_tables_and_plots(tmp_path, study_of(pictures=0), [], rows)
    assert "over baseline" in printed
    time = format_training_time(rows)
    assert time in printed and time in (tmp_path / "table.md").read_text()


def test_the_time_of_all_runs_is_added_up():
    rows = [{"seconds": 3600.0}, {"seconds": 1800.5}, {"seconds": 130.0}]
    assert format_training_time(rows) == "3 runs, trained in 1 h 32 min added up"
    assert format_training_time([{"seconds": 3599}]) == "1 run, trained in 1 h 00 min"


def test_what_fails_before_its_first_step_leaves_no_trace(tmp_path):
    def refuse(config, test, report):
        raise InputError("weights", "missing", "a file")

    _, failed, _ = run(study_of(), tmp_path / "out", refuse, only=["baseline"])
    assert failed and not (tmp_path / "out").exists()
    run(study_of(), tmp_path / "out", FakeTraining(), only=["baseline"])
    study = study_of()
    study.runs["baseline"].config.model.width = 16
    run(study, tmp_path / "out", refuse, only=["baseline"])
    assert (tmp_path / "out" / "baseline_seed0" / "model_final.pth").is_file()  # not moved either
    with pytest.raises(InputError, match="not registered"):
        run(study_of(test="shape_test"), tmp_path / "other", FakeTraining())
    assert not (tmp_path / "other").exists()


def test_fingerprints_are_of_content(tmp_path):
    def key(study, finished=()):
        [run] = study.plan(only=["baseline"])
        return prepare_recipe(run, {}, tmp_path)[1]

    same, other = study_of(), study_of()
    other.runs["baseline"].config.optimizer.lr = 0.2
    assert key(study_of()) == key(same) != key(other)
    same.runs["baseline"].config.train.draw_period = 10  # to be looked at makes no other run
    assert key(same) == key(study_of())

    # Objects count by what they hold, not by where they lie.
    class Held:
        def __init__(self, value):
            self.value = value

    def held(value):
        study = study_of()
        study.runs["baseline"].config.model.held = Held(value)
        return key(study)

    assert held(1) == held(1) != held(2)


def row(method, seed, ap):
    about = dict(name=f"{method}{seed}", method=method, seed=seed, parameters=5, seconds=10.0)
    return about | ap_metrics({"AP": ap, "AP50": ap}, ["x"])


def test_gains_are_paired():
    rows = [row("b", 0, 10), row("b", 1, 30), row("m", 1, 33), row("m", 0, 11), row("m", 2, 9)]
    interval = pytest.approx((2 - 12.706, 2 + 12.706))
    found = {"mean_gain": 2.0, "std_gain": math.sqrt(2), "interval": interval}
    assert compute_gains(rows, "m", "b") == found | {"gains": [1.0, 3.0, None]}
    found = {"mean_gain": 1.0, "std_gain": None, "interval": None, "gains": [1.0]}
    assert compute_gains(rows[:1] + rows[3:4], "m", "b") == found


@pytest.mark.parametrize("count", [2, 3, 6, 30])
def test_the_interval_covers_the_mean_95_times_in_100(count):
    random = np.random.default_rng(count)
    intervals = [t_interval(list(random.normal(size=count))) for _ in range(1000)]
    assert 0.93 < np.mean([low <= 0 <= high for low, high in intervals]) < 0.97
    assert t_interval([1.0]) is None and t_interval([]) is None
    assert t_interval([2.0, 2.0]) == (2.0, 2.0)


def test_tables_as_text_and_as_markdown():
    lines = [["a", "bb"], ["  c", "1.0"], ["", "-"]]
    expected = ["a      bb", "---  ----", "  c   1.0", "        -"]
    assert format_text_table(lines).splitlines() == expected
    cells = [line.split("|")[1:-1] for line in format_markdown_table(lines).splitlines()]
    cells = [[cell.strip() for cell in line] for line in cells]
    assert [cells[0], *cells[2:]] == [["a", "bb"], ["c", "1.0"], ["", "-"]]
    assert all(set(cell) <= set("-:") for cell in cells[1])
    assert len(format_text_table(lines[:1]).splitlines()) == 2


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_one_line_on_a_terminal_and_few_elsewhere(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    for console in (io.StringIO(), Terminal()):
        line = ProgressBar("  tar", console)
        for step in range(40, 101):
            now[0] += 1
            line(step, 100)
        line.close("AP 1.0")
        line.close("shared_across_seeds")
        printed = console.getvalue()
        assert printed.endswith("  tar  AP 1.0\n")
        assert "70/100  00:30 elapsed  00:30 left" in printed  # by the steps that were made here
        if console.isatty():
            assert printed.count("\n") == 1 and "100/100" in printed
        else:
            assert "\r" not in printed and 3 <= printed.count("\n") <= 5


def test_an_only_class_and_undefined_figures():
    assert ap_metrics({"AP": 7.0}, ["x"])["per_class"] == {"x": 7.0}
    expected = {math.nan: None, -1: None, None: None, math.inf: None, 0.0: 0.0}
    assert [ap_metrics({"AP": value}, ["x"])["AP"] for value in expected] == [*expected.values()]


def test_the_table_shows_each_seed():
    rows = [row("teacher", 0, 42), row("b", 0, 10), row("b", 1, 12), row("m", 0, 11)]
    rows += [row("m", 1, 15), row("i", 0, -1), row("i", 1, 11.99)]
    lines = [
        line.split() for line in format_results(rows, "val", ["b", "i"], ["m", "i"]).splitlines()
    ]
    assert ["AP", "42.0", "11.0", "±1.4", "13.0", "±2.8", "12.0"] in lines
    assert ["AP", "small", "-", "-", "-", "-"] in lines
    assert ["m", "mean", "+2.0", "±1.4", "+3.0"] in lines
    assert ["95", "%", "-10.7", "to", "+14.7", "-"] in lines
    assert ["seed", "0", "+1.0", "-"] in lines and ["seed", "1", "+3.0", "+3.0"] in lines
    assert ["i", "mean", "+0.0"] in lines
    one = format_results(rows[:2] + rows[3:4], "val", ["b", "absent"], ["m"])
    assert one.splitlines()[-1].split() == ["m", "seed", "0", "+1.0"]
    assert "gain" not in format_results(rows[:1], "val", ["b"], ["m"])


def test_mask_ap_is_beside_box_ap(tmp_path):
    def both(method, seed, box, mask):
        return row(method, seed, box) | {"segm": ap_metrics({"AP": mask, "AP50": mask}, ["x"])}

    rows = [both("b", 0, 10, 5), both("b", 1, 12, 6), both("m", 0, 11, 9), both("m", 1, 15, 8)]
    text = format_results([*rows, row("boxes", 0, 20)], "val", ["b"], ["m"])
    lines = [line.split() for line in text.splitlines()]
    assert ["AP", "11.0", "±1.4", "13.0", "±2.8", "20.0"] in lines
    assert ["mask", "AP", "5.5", "±0.7", "8.5", "±0.7", "-"] in lines
    assert ["mask", "AP50", "5.5", "±0.7", "8.5", "±0.7", "-"] in lines
    assert [["m", "mean", f"+{gain}", "±1.4"] in lines for gain in ("2.0", "3.0")] == [True, True]
    assert "gain in mask AP" in text and "mask" not in format_results(
        [row("b", 0, 1)], "val", [], []
    )
    study = study_of(compare=[])
    for one in rows:
        one["method"] = {"b": "baseline", "m": "tar"}[one["method"]]
    write_results(tmp_path, study, rows)
    (found,) = json.loads((tmp_path / "gains.json").read_text())["rows"]
    assert (found["mean_gain"], found["segm"]["mean_gain"]) == (2.0, 3.0)
    for one in rows:
        one |= dict.fromkeys(("config", "log", "weights_sha256", "teacher_sha256"))
    assert "mask AP" in provenance_table(rows) and "mask" not in provenance_table(rows[:0])


def test_closing_words_name_what_to_open(tmp_path):
    train = FakeTraining()
    study = study_of(pictures=2)
    rows, _, _ = run(study, tmp_path, train, [0])
    words = write_tables_and_plots(tmp_path, study, study.plan([0]), rows)
    for name in ("pictures", "curves.png", "gains.png", "results.json", "table.txt", "table.md"):
        assert str(tmp_path / name) in words and (tmp_path / name).exists()
    written = (tmp_path / "table.md").read_text()
    for row in rows:
        assert f"[config]({row['name']}/config.yaml)" in written
        assert f"[log]({row['name']}/log.txt)" in written
        assert row["weights_sha256"][:12] in written
    of = {row["method"]: row for row in rows}
    assert of["teacher"]["teacher_sha256"] is None
    assert of["tar"]["teacher_sha256"] == of["teacher"]["weights_sha256"]
    assert len(list((tmp_path / "pictures").iterdir())) == 2


STUDIES = sorted(ROOT.glob("projects/*/studies/*.py"))
STUDIES = [path.relative_to(ROOT) for path in STUDIES if path.stem != "common"]
LIKE_OTHERS = {"shapes_long", "shapes_ablations", "shapes_three_increments", "aquarium_lite"}
LIKE_OTHERS |= {"faster_rcnn_from_retinanet", "mobilenet_v3_from_resnet"}
INCREMENTAL = "projects/ERD/studies"


def test_fast_is_short_and_on_few_images(tmp_path, monkeypatch):
    monkeypatch.setenv("D2KD_DATASETS", str(tmp_path))
    _, runs = load_and_plan("projects/TAR/studies/shapes.py", [0], [], True)
    assert {run.config.train.max_iter for run in runs} == {12}
    assert len(DatasetCatalog.get("shapes_train")) == 32
    assert {path.parent.parent for path in tmp_path.glob("**/*.json")} == {tmp_path}


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            x, marks=[pytest.mark.sweep] * (x.stem in LIKE_OTHERS or "bccd" in x.stem), id=x.stem
        )
        for x in STUDIES
    ],
)
def test_every_study_is_whole(path, tmp_path, monkeypatch):
    monkeypatch.delenv("D2KD_BCCD", raising=False)
    if "bccd" in path.stem:
        with pytest.raises(InputError, match="D2KD_BCCD: not set; expected the folder"):
            load_study(str(path))
        monkeypatch.setenv("D2KD_BCCD", str(write_voc(tmp_path / "cells", CELLS, BLOOD)))
    if "aquarium" in path.stem:
        names = "fish jellyfish penguin puffin shark starfish stingray".split()
        categories = [{"id": k, "name": name} for k, name in enumerate(names)]
        (tmp_path / "images").mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / "images/0.jpg")
        image = {"id": 0, "file_name": "0.jpg", "width": 8, "height": 8}
        content = {"images": [image], "categories": categories, "annotations": []}
        for part in ("train", "val", "test"):
            (tmp_path / f"{part}.json").write_text(json.dumps(content))
        monkeypatch.setenv("D2KD_AQUARIUM", str(tmp_path))
    study = load_study(str(path))
    planned = {run.name: run for run in study.plan([0], only=list(study.runs))}
    if "bccd" in path.stem:
        for run in planned.values():
            names = [run.config.dataloader[part].dataset.names for part in ("train", "test")]
            assert study.increments or check_dataset(names) == ["bccd_train", "bccd_val"]
    if path.stem == "gfl_beside_retinanet":
        gfl, retinanet = (dict(planned[f"{m}_seed0"].config) for m in ("gfl", "retinanet"))
        assert gfl["model"].pop("_target_") != retinanet["model"].pop("_target_")
        for of in (gfl, retinanet):
            of["backbone"] = of.pop("model").backbone.bottom_up
            of["optimizer"].pop("lr")
        assert gfl == retinanet
        return
    if str(path.parent) == INCREMENTAL:
        assert study.increments and study.upper_bound
        assert set(planned) == {f"{m}_seed0" for m in study.runs}
        for run in planned.values():
            later = (study.increment_of(run.method) or 1) > 1
            assert ("losses" in run.config.model) == bool(run.teacher) == later
        return
    assert {"teacher", "baseline_seed0"} <= planned.keys()
    assert any(name.startswith("baseline_equal_time") for name in planned)
    for run in planned.values():
        model = run.config.model
        assert ("losses" in model) == bool(run.teacher)
        if run.method.startswith("tar_"):  # one term, at the weight it has in the whole
            whole = planned["tar_seed0"].config.model.losses.tar
            own = model.losses.tar
            on = {k for k in own if k.endswith("_weight") and own[k]}
            assert on == {run.method.removeprefix("tar_") + "_weight"}
            assert all(own[k] == whole[k] for k in on)


@pytest.mark.parametrize(
    "path, method",
    [(f"ICD/studies/{x}", "icd") for x in ("shapes", "shapes_ablations", "bccd_retinanet")]
    + [("TAR/studies/shapes_ablations", "tar")],
)
def test_rows_differ_in_what_their_gain_is_of(path, method):
    """Each way to distil is its own; beside it nothing changes but what the student inherits."""
    content = LazyConfig.load(f"projects/{path}.py")
    study = build_study(OmegaConf.merge(content, {"study": {"test": "x"}}))
    rows = {}
    for run in study.plan([0], only=list(study.runs)):
        config = OmegaConf.to_container(run.config, resolve=False)
        loss = (config["model"].get("losses") or {}).pop(method, None)
        if loss is not None:
            rows[run.method] = {**loss, "inherit": config["model"].pop("inherit", None)}, config
    loss, rest = rows[method]
    assert all(other == rest for _, other in rows.values())
    losses = [json.dumps(one, default=str, sort_keys=True) for one, _ in rows.values()]
    assert len(losses) == len(set(losses)) > 3


def test_a_finished_run_is_not_in_the_memory_of_the_next(tmp_path, monkeypatch):
    alive = []

    class Watched(Trainer):
        def __init__(self, config):
            super().__init__(config)
            alive.append(weakref.ref(self))

    monkeypatch.setattr("d2kd.study.run.Trainer", Watched)
    draw_data(tmp_path / "data")
    config = tiny_recipe(tmp_path / "data", tmp_path / "run", max_iter=1)
    train(config, config.dataloader.test.dataset.names, lambda step, steps: None)
    PeakMemory(torch.device("cpu"))
    assert len(alive) == 1 and alive[0]() is None


FAST = """train.max_iter=2 train.eval_period=0 train.checkpointer.period=1 train.log_period=1
train.device=cpu train.eval_teacher=False dataloader.train.total_batch_size=2
dataloader.train.num_workers=0 dataloader.test.num_workers=0""".split()


def test_a_real_study_trains_measures_and_continues(tmp_path):
    study = load_study("projects/TAR/studies/shapes.py")
    models = study.runs["teacher"].config.model, study.runs["tar"].config.model.teacher.detector
    for teacher in models:
        teacher.backbone.bottom_up.width = 4
    about = dict(test="shapes_test", baseline="baseline", featured="tar", pictures=1, fast=FAST)
    study = build_study(dict(runs=study.runs, study=about))
    runs = study.plan(only=["baseline", "tar"], fast=True)
    with pytest.raises(KeyboardInterrupt):
        run_study(study, runs, tmp_path, SequentialRunner(interrupted_in("tar")), io.StringIO())
    assert not (tmp_path / "tar_seed0" / "model_final.pth").exists()
    rows, failed = run_study(study, runs, tmp_path, console=io.StringIO())
    assert not failed
    assert [row["name"] for row in rows] == ["teacher", "baseline_seed0", "tar_seed0"]
    assert all(row["seconds"] > 0 and 0 <= row["AP"] <= 100 for row in rows)
    assert rows[1]["parameters"] == rows[2]["parameters"]  # the student's alone
    for row in rows:
        assert (tmp_path / row["name"] / "config.yaml").is_file()
    words = write_tables_and_plots(tmp_path, study, runs, rows)
    assert "gain in AP" in words and len(list((tmp_path / "pictures").iterdir())) == 1
    # Killed in its last evaluation, when its weights were there and its record was not yet.
    folder = tmp_path / "tar_seed0"
    for name in ("run.json", "study.json"):
        record = json.loads((folder / name).read_text())
        starts = [{"start_iter": 0, "peak_memory": 3 << 20}, {"peak_memory": 1 << 20}]
        record["rows"] = [] if name == "study.json" else starts
        (folder / name).write_text(json.dumps(record))
    again, failed = run_study(study, runs, tmp_path, console=io.StringIO())
    assert not failed and [row["seconds"] for row in again] == [row["seconds"] for row in rows]
    assert [row["AP"] for row in again] == [row["AP"] for row in rows]
    assert again[-1]["peak_memory_mib"] == 3


def test_no_runs_at_a_time_are_refused(refuses):
    refuses(lambda: command("study")(["none.py", "--jobs", 0]), "--jobs: 0; expected 1 or more")


def test_what_is_quiet_for_a_while_is_as_loud_as_before():
    logger = logging.getLogger("d2kd")
    logger.setLevel(logging.DEBUG)
    before = logger.handlers[:], logger.propagate
    with suppress_output():
        assert not logger.isEnabledFor(logging.DEBUG)
    assert logger.level == logging.DEBUG and (logger.handlers, logger.propagate) == before
