"""Runs of a study that are trained on another run's detections as labels."""

import io
import json
from pathlib import Path

import pytest
from detectron2.config import LazyCall as L
from detectron2.data import MetadataCatalog
from omegaconf import OmegaConf

from d2kd.comparison.labels import training_images
from d2kd.data import subset
from d2kd.report.page import render
from d2kd.study import (
    ParallelRunner,
    SequentialRunner,
    build_study,
    run_study,
    write_tables_and_plots,
)
from d2kd.study import run as training
from d2kd.study.report import study_report
from d2kd.utils.errors import InputError

from .common import interrupted_in
from .test_comparison import compared, data  # noqa: F401  (fixtures)
from .tiny_run import distiller, draw_data, recipe


@pytest.fixture
def study_of(tmp_path):
    """``study_of(min_score=…)``: two of the six images have labels; only the teacher sees all of them."""
    draw_data(tmp_path / "data")

    def make(**labels):
        plain = recipe(tmp_path / "data", Path("none"), max_iter=2)
        distilled = recipe(tmp_path / "data", Path("none"), distiller(), max_iter=2)
        distilled.model.teacher.detector = plain.model
        whole = plain.dataloader.train.dataset.names
        teacher = plain.copy()
        for one in (plain, distilled):
            one.dataloader.train.dataset.names = L(subset)(dataset=whole, images=2)
        others = L(subset)(dataset=whole, images=2, complement=True)
        given = dict(detector="teacher", dataset=others, min_score=0.1) | labels
        runs = dict(
            pseudo=dict(config=plain, labels=given),
            teacher=dict(config=teacher, shared_across_seeds=True),
            baseline=dict(config=plain),
            tar=dict(config=distilled, teacher="teacher", labels=given),
            equal_time=dict(config=plain, match_time_of="tar", labels=given, optional=True),
        )
        test = plain.dataloader.test.dataset.names
        about = dict(test=test, baseline="baseline", featured="tar", pictures=0)
        content = dict(study=about, runs=runs)
        return build_study(OmegaConf.create(content, flags={"allow_objects": True}))

    return make


def run(study, output, only=("pseudo",), trainer=None):
    console = io.StringIO()
    rows, failed = run_study(study, study.plan(only=only), output, trainer, console)
    return {row["method"]: row for row in rows}, failed, console.getvalue()


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.sweep)])
def test_the_detector_is_trained_first_and_labels_once(study_of, tmp_path, monkeypatch, jobs):
    calls, write = [], training.write_labels
    monkeypatch.setattr(training, "write_labels", lambda *args: calls.append(args) or write(*args))
    trainer = ParallelRunner(jobs) if jobs > 1 else SequentialRunner()
    rows, failed, printed = run(study_of(), tmp_path / "out", trainer=trainer)
    assert not failed and list(rows) == ["pseudo", "teacher"]
    [file] = (tmp_path / "out" / "teacher").glob("labels_*.json")
    content = json.loads(file.read_text())
    assert len(content["images"]) == 4 and content["annotations"]
    assert min(one["score"] for one in content["annotations"]) >= 0.1
    assert f"labels of teacher  4 images, {len(content['annotations'])} boxes" in printed
    counts = {m: (r["train_images"], r["pseudo_labelled_images"]) for m, r in rows.items()}
    assert counts == {"teacher": (6, 0), "pseudo": (6, 4)}
    # Finished runs need no labels, and other runs with the same labels use the file.
    _, _, printed = run(study_of(), tmp_path / "out", ["pseudo"])
    assert printed.count("finished before") == 2 and "labels of" not in printed
    if jobs > 1:
        return
    rows, failed, _ = run(study_of(), tmp_path / "out", ["tar"])
    assert not failed and rows["tar"]["pseudo_labelled_images"] == 4 and len(calls) == 1
    # Other labels make another run.
    rows, _, printed = run(study_of(min_score=1.0), tmp_path / "out")
    assert "labels of teacher  4 images, 0 boxes, 4 images without any" in printed
    assert rows["pseudo"]["train_images"] == 6 and len(calls) == 2
    assert (tmp_path / "out" / "pseudo_seed0.old1").is_dir()


def test_an_interrupted_run_uses_its_labels_again(study_of, tmp_path, monkeypatch):
    study = study_of()
    with pytest.raises(KeyboardInterrupt):
        run(study, tmp_path / "out", trainer=SequentialRunner(interrupted_in("pseudo")))
    [file] = (tmp_path / "out" / "teacher").glob("labels_*.json")
    before = file.read_bytes()
    (tmp_path / "out").rename(tmp_path / "moved")

    def refuse(*args):
        raise AssertionError("labelled again")

    monkeypatch.setattr(training, "write_labels", refuse)
    rows, failed, _ = run(study, tmp_path / "moved")
    assert not failed and rows["pseudo"]["pseudo_labelled_images"] == 4
    assert (tmp_path / "moved" / "teacher" / file.name).read_bytes() == before


def test_an_interruption_while_labelling(study_of, tmp_path, monkeypatch):
    def stop(file, *args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "write_labels", stop)
        run(study_of(), tmp_path)
    assert not (tmp_path / "pseudo_seed0").exists()
    rows, failed, printed = run(study_of(), tmp_path)
    assert not failed and "teacher       finished before" in printed and len(rows) == 2


def test_labels_that_cannot_be_made_fail_their_run_alone(study_of, tmp_path):
    whole = study_of().runs["baseline"].config.dataloader.test.dataset.names
    study = study_of(dataset=L(subset)(dataset=whole, images=6, complement=True))
    rows, failed, printed = run(study, tmp_path, ["pseudo", "baseline"])
    assert list(failed) == ["pseudo_seed0"] and set(rows) == {"teacher", "baseline"}
    assert "labels of teacher  failed: subset of" in printed


def test_equal_time_is_measured_without_labels(study_of, tmp_path):
    timed = []

    def cost(distilled, plain, progress):
        timed.extend([distilled, plain])
        return dict(ratio=1.0, low=1.0, high=1.0, pairs=3, clock="cpu seconds")

    trainer = SequentialRunner(step_cost=cost)
    rows, failed, _ = run(study_of(), tmp_path, ["equal_time"], trainer)
    assert not failed and rows["equal_time"]["pseudo_labelled_images"] == 4
    names = [one.dataloader.train.dataset.names for one in timed]
    assert len(names) == 2 and not any(OmegaConf.is_list(one) for one in names)


@pytest.mark.sweep
def test_tables_and_the_report_say_how_many_images(study_of, tmp_path):
    study = study_of()
    rows, _, _ = run(study, tmp_path, ["pseudo", "baseline", "tar"])
    rows = list(rows.values())
    line = "Trained on different numbers of images: pseudo, tar 6, 4 of them with a detector's labels; "
    line += "teacher 6; baseline 2."
    assert line in write_tables_and_plots(tmp_path, study, [], rows)
    assert (
        line in (tmp_path / "table.txt").read_text() and line in (tmp_path / "table.md").read_text()
    )
    line = "Trained on different numbers of images: teacher 6; baseline 2; tar 6, 4 of them with"
    assert line in study_report(tmp_path, study, rows).read_text()


def test_equal_numbers_of_images_are_not_mentioned(compared):  # noqa: F811
    assert "Trained on different numbers of images" not in render(compared[1])
    assert training_images([("a", 5, 0), ("b", 5, None)]) == ""
    assert training_images([("a", 5, 0), ("b", None, 0)]) == ""
    found = training_images([("a", 5000, 0), ("b", 150, 0), ("a", 5000, 0)])
    assert found == "Trained on different numbers of images: a 5,000; b 150."


@pytest.mark.parametrize(
    "labels, line",
    [
        (dict(detector="techer"), "runs.pseudo.labels.detector: unknown 'techer'"),
        (dict(detector="baseline"), ""),
        (dict(min_score=2), "runs.pseudo.labels.min_score: 2; expected a score from 0 to 1"),
        (dict(min_score="0.5"), "runs.pseudo.labels.min_score: 0.5; expected a score"),
        (dict(dataset="nowhere"), "runs.pseudo.labels.dataset: 'nowhere'; expected a registered"),
        (dict(score=0.5), "runs.pseudo.labels: unknown 'score'; expected one of detector, data"),
    ],
)
def test_mistakes_are_named(study_of, labels, line):
    if not line:
        assert len(study_of(**labels).plan(only=["pseudo"])) == 2
        return
    with pytest.raises(InputError, match=line):
        study_of(**labels)


@pytest.mark.parametrize(
    "change, line",
    [
        (dict(labels="teacher"), "runs.pseudo.labels: 'teacher'; expected dict.detector=<run>"),
        (dict(labels=dict(detector=None, dataset="x")), r"runs.pseudo.labels: \{'detector': None"),
        (dict(labels=dict(detector="teacher")), r"runs.pseudo.labels: \{'detector': 'teacher'\}"),
        (dict(shared_across_seeds=True, labels=dict(detector="baseline")), "is made per seed"),
        (dict(config=dict(train=dict(max_iter=3))), "without dataloader.train.dataset.names"),
    ],
)
def test_mistakes_of_a_run_are_named(study_of, change, line):
    study = study_of()
    node = OmegaConf.to_container(study.runs["pseudo"], resolve=False)
    if isinstance(change.get("labels"), dict) and "shared_across_seeds" in change:
        change = change | {"labels": node["labels"] | change["labels"]}
    runs = dict(study.runs) | {
        "pseudo": OmegaConf.create(node | change, flags={"allow_objects": True})
    }
    about = dict(test=study.test, baseline="baseline")
    assert MetadataCatalog.get(study.test).thing_classes
    with pytest.raises(InputError, match=line):
        build_study(dict(study=about, runs=runs))
