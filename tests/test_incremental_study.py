"""Studies of class increments: what runs are measured on, and the figures after each increment."""

import copy
import io
import json
import math

import pytest
import torch
from omegaconf import OmegaConf

from d2kd.config import incremental_recipe, load
from d2kd.data import coco_dataset, shapes
from d2kd.study import (
    SequentialRunner,
    build_study,
    load_study,
    run_study,
    write_tables_and_plots,
)
from d2kd.study.incremental import forgetting_per_class, gaps_to_upper_bound, mean_ap_old_new_all
from d2kd.utils.errors import InputError

from . import common
from .common import interrupted_in
from .test_study import FAST, FakeTraining
from .tiny_run import draw_data

CLASSES = list(shapes.CLASSES)


few_shapes = common.few_shapes(train=8, val=4, test=6)


def test_means_and_gaps():
    per_class = {"a": 10.0, "b": 20.0, "c": None, "d": 60.0}
    increments = [["a"], ["b", "c"], ["d"]]
    assert mean_ap_old_new_all(per_class, increments, 1) == {"old": None, "new": 10.0, "all": 10.0}
    assert mean_ap_old_new_all(per_class, increments, 2) == {"old": 10.0, "new": 20.0, "all": 15.0}
    assert mean_ap_old_new_all(per_class, increments, 3) == {"old": 15.0, "new": 60.0, "all": 30.0}
    assert mean_ap_old_new_all({}, increments, 3) == {"old": None, "new": None, "all": None}
    lost = forgetting_per_class({"a": 30.0, "b": None}, per_class, ["a", "b"])
    assert lost == {"a": 20.0, "b": None}
    # As published for 40.2 and 34.4: 5.8 points, 14.4 percent.
    assert gaps_to_upper_bound(34.4, 40.2) == pytest.approx((5.8, 0.144), abs=5e-4)
    assert (
        gaps_to_upper_bound(None, 40.2)
        == gaps_to_upper_bound(3.0, 0.0)
        == gaps_to_upper_bound(3.0, None)
        == (None, None)
    )


def study_of(split="4+2+2", runs=None, **study):
    def recipe(**model):
        return dict(model=model, train=dict(max_iter=1))

    learner = recipe(teacher=dict(weights=""))
    all_runs = dict(
        first=dict(config=recipe(), increment=1),
        second=dict(config=learner, increment=2, teacher="first"),
        third=dict(config=learner, increment=3, teacher="second"),
        everything=dict(config=recipe()),
    )
    given = dict(test="shapes_test", baseline="third", increments=split, upper_bound="everything")
    content = dict(study=given | dict(pictures=0) | study, runs=all_runs)
    content = OmegaConf.create(content, flags={"allow_objects": True})
    return build_study(OmegaConf.merge(content, dict(runs=runs or {})))


APS = {
    "first": [50.0, 40.0, 30.0, 20.0],
    "second": [40.0, 40.0, 10.0, 10.0, 60.0, 30.0],
    "third": [20.0, 30.0, 0.0, 10.0, 50.0, 40.0, 70.0, 80.0],
    "everything": [60.0, 50.0, 40.0, 30.0, 60.0, 50.0, 70.0, 60.0],
}


def run(study, output, aps=APS, seeds=(0,), only=()):
    shifted = {f"{m}_seed{s}": [ap + s for ap in v] for m, v in aps.items() for s in seeds}
    train, runs = FakeTraining(shifted), study.plan(seeds, only)
    rows, failed = run_study(study, runs, output, SequentialRunner(train), io.StringIO())
    assert not failed
    return train, rows, write_tables_and_plots(output, study, runs, rows)


def test_a_test_split_without_an_increments_objects_is_found_before_training(tmp_path):
    draw_data(tmp_path / "data")
    file = tmp_path / "data" / "data.json"
    content = json.loads(file.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] != 1]
    file.write_text(json.dumps(content))
    test = coco_dataset(f"few_{tmp_path}", str(file), str(tmp_path / "data"))
    study = study_of([["class 0"], ["class 1"], ["class 2"]], test=test)
    with pytest.raises(
        InputError, match="_cumulative1': no object of class 0; expected at least one"
    ):
        run(study, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_figures_after_each_increment(tmp_path):
    """Forgetting is against the run that learned the class, two increments back as well as one."""
    train, _, _ = run(study_of(), tmp_path)
    tests = {f"{x}_seed0": f"shapes_test_4+2+2_cumulative{k}" for k, x in enumerate(APS, 1)}
    assert train.tests == tests | {"everything_seed0": "shapes_test"}
    record = json.loads((tmp_path / "second_seed0" / "study.json").read_text())
    assert record["dataset"] == "shapes_test_4+2+2_cumulative2"
    content = json.loads((tmp_path / "increments.json").read_text())
    assert content["schema"] == 1
    assert content["increments"] == [CLASSES[:4], CLASSES[4:6], CLASSES[6:]]
    first, second, third, everything = content["rows"]
    assert (first["old"], first["new"], first["all"]) == (None, 35.0, 35.0)
    assert first["forgetting"] == {} and first["mean_forgetting"] is None
    assert (second["old"], second["new"]) == (25.0, 45.0)
    assert second["all"] == pytest.approx(190 / 6) and second["abs_gap"] is None
    assert list(second["forgetting"].values()) == [10.0, 0.0, 20.0, 10.0]
    assert third["old"] == 25.0 and third["new"] == 75.0 and third["all"] == 37.5
    lost = dict(zip(CLASSES, [30.0, 10.0, 30.0, 10.0, 10.0, -10.0]))
    assert third["forgetting"] == lost and list(third["forgetting"]) == CLASSES[:6]
    assert third["mean_forgetting"] == pytest.approx(80 / 6)
    assert third["abs_gap"] == 15.0 and third["rel_gap"] == pytest.approx(15 / 52.5)
    assert everything["all"] == 52.5 and everything["abs_gap"] is None


def test_the_table(tmp_path):
    _, _, words = run(study_of(), tmp_path, seeds=[0, 1])
    lines = [line.split() for line in words.splitlines()]
    assert ["third", "3", "25.5", "±0.7", "75.5", "±0.7", "38.0", "±0.7"] == lines[4][:8]
    assert lines[4][8:] == ["13.3", "±0.0", "15.0", "±0.0", "28.3", "±0.4"]
    assert ["AP", "lost", "second", "third"] in lines
    assert [CLASSES[0], "10.0", "±0.0", "30.0", "±0.0"] in lines
    # What other runs reached on fewer classes is not set beside what these did on all.
    heading = next(line for line in lines if line[:3] == ["AP", "on", "shapes_test"])
    assert heading[3:] == ["third", "everything"]
    assert (tmp_path / "table.txt").read_text().count("AP after each increment") == 1
    written = (tmp_path / "table.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in written]
    assert [CLASSES[0], "10.0 ±0.0", "30.0 ±0.0"] in cells
    assert ["AP on shapes_test", "third", "everything"] in cells


def test_the_tables_of_a_first_increment_alone(tmp_path):
    run(study_of(), tmp_path, only=["first"])
    for name in ("table.txt", "table.md"):
        written = (tmp_path / name).read_text()
        assert "AP after each increment" in written and "AP on" not in written


def test_what_found_nothing_is_undefined(tmp_path):
    aps = {**APS, "third": [math.nan] * 8}
    _, _, words = run(study_of(), tmp_path, aps)
    rows = json.loads((tmp_path / "increments.json").read_text())["rows"]
    assert rows[2]["old"] is None and rows[2]["rel_gap"] is None and "third" in words


@pytest.mark.parametrize(
    "change, line",
    [
        (dict(runs=dict(second=dict(increment=4))), "second.increment: 4; expected from 1 to 3"),
        (dict(upper_bound="all"), "unknown 'all'"),
        (dict(split="4+5"), "split 4.5: 9 classes; expected 8 in all"),
        (dict(split=[]), "increment: 1; expected none, without study.increments"),
    ],
)
def test_mistakes_are_named(change, line):
    with pytest.raises(InputError, match=line):
        study_of(**change)


def test_an_increment_is_a_recipe_of_its_own():
    base = load("baselines/gfl_small_shapes.py")
    recipe = incremental_recipe(base, split="4+2+2", increment=2)
    model = recipe.model
    assert base.model.num_classes == 8 and "num_old_classes" not in base.model
    assert (model.student.num_classes, model.student.num_old_classes) == (6, 4)
    assert model.teacher.detector.num_classes == 4 and list(model.classes) == CLASSES[:6]
    assert list(model.teacher.classes) == CLASSES[:4] and list(model.inherit) == [""]
    assert incremental_recipe(base, split="4+2+2", increment=1).model.num_classes == 4
    listed = copy.deepcopy(base)
    for part in (listed.dataloader.train, listed.dataloader.test):
        part.dataset.names = [part.dataset.names]
    assert incremental_recipe(listed, split="4+2+2", increment=2) == recipe
    line = "increment: a recipe of another detector; expected one of"
    with pytest.raises(InputError, match=line):
        incremental_recipe("baselines/retinanet_small_shapes.py", split="4+4", increment=1)
    with pytest.raises(InputError, match="increment: 3; expected from 1 to 2"):
        incremental_recipe(base, split="4+4", increment=3)


def test_a_real_study_goes_on_where_it_was_stopped(tmp_path):
    """Two increments of two iterations, interrupted in the second; classes by name in every file."""
    study = load_study("projects/ERD/studies/shapes.py")
    about = dict(test="shapes_test", baseline="fine_tuning", featured="erd", increments="4+4")
    about |= dict(upper_bound="everything", pictures=1, fast=FAST)
    study = build_study(dict(runs=study.runs, study=about))
    runs = study.plan(fast=True)
    assert len(runs) == 5
    with pytest.raises(KeyboardInterrupt):
        run_study(study, runs, tmp_path, SequentialRunner(interrupted_in("erd")), io.StringIO())
    rows, failed = run_study(study, runs, tmp_path, console=io.StringIO())
    assert not failed and len(rows) == 5
    names = {row["method"]: torch.load(row["weights"])["classes"] for row in rows}
    assert names.pop("first") == CLASSES[:4] and all(v == CLASSES for v in names.values())
    sizes = {row["method"]: row["parameters"] for row in rows}
    assert sizes["fine_tuning"] == sizes["erd"] == sizes["everything"] > sizes["first"]
    words = write_tables_and_plots(tmp_path, study, runs, rows)
    assert "AP after each increment" in words and "RelGap" in words
    assert len(list((tmp_path / "pictures").iterdir())) == 1
    assert len(json.loads((tmp_path / "increments.json").read_text())["rows"]) == 5
