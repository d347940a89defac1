"""The command line of the comparison, and the report that ends a study."""

import json
import re

import pytest
from detectron2.data import DatasetCatalog

from d2kd.config import load
from d2kd.config.saving import save_config
from d2kd.study.plan import Study
from d2kd.study.report import study_report
from d2kd.tools.compare import detectors_from_folder
from d2kd.utils.io import write_json

from .common import command, refusal, tiny_faster_rcnn
from .test_comparison import data, named, saved, study  # noqa: F401  (fixtures)
from .test_comparison import trained as leave
from .tiny_run import distiller, draw_data, recipe, teacher_weights


def compare(*words):
    command("compare")(words)


def test_results_count_as_detections_from_a_threshold_on(data, tmp_path, capsys):  # noqa: F811
    """Every object with a score of 0.9, and a detection with 0.3 in the image that has none."""
    config, weights = saved(tmp_path / "it", data, tiny_faster_rcnn(), 0)
    truth = json.loads((data / "data.json").read_text())["annotations"]
    rows = [a | {"score": 0.9} for a in truth if not a["iscrowd"]]
    assert 2 not in {row["image_id"] for row in rows}
    rows.append(rows[0] | {"image_id": 2, "score": 0.3})
    (tmp_path / "results.json").write_text(json.dumps(rows))
    words = ["--detector", f"it={config},{weights},{tmp_path / 'results.json'}"]
    words += ["--detector", f"same={config},{weights}", "--dataset", named(data)]
    words += ["--resamples", 5, "--observe", 1, "--output", tmp_path]
    for threshold, wrong in ((0.2, 1), (None, 0)):
        compare(*words, *([] if threshold is None else ["--threshold", threshold]))
        printed = capsys.readouterr().out
        assert str(tmp_path / "report.html") in printed
        assert re.search(r"^it +100\.0 +100\.0 *$", printed, re.MULTILINE)  # the baseline
        assert re.search(r"^same +\S+ +\S+ +-100\.0 \(\S+ to \S+\)$", printed, re.MULTILINE)
        content = json.loads((tmp_path / "report.json").read_text())
        row, other = content["rows"]
        assert (row["name"], other["name"], content["resamples"]) == ("it", "same", 5)
        assert row["accuracy"]["metrics"]["AP"] == pytest.approx(100)
        fixed = row["accuracy"]["fixed"]
        assert (fixed["recall"], fixed["wrong"]) == (100, wrong)
        assert content["threshold"] == fixed["threshold"] == (threshold or 0.5)


@pytest.fixture
def trained(data, tmp_path):  # noqa: F811
    """The folder of a run with a teacher, measured on other data than it was trained on: on three images."""
    run = tmp_path / "run"
    config = recipe(data, run, distiller(teacher_weights(tmp_path / "taught")))
    draw_data(tmp_path / "other", objects=(1, 2, 1))
    test = recipe(tmp_path / "other", run).dataloader.test.dataset.names
    config.dataloader.test.dataset.names = test
    return leave(config, run)


def written_by(folder, *words, output=None):
    """The names of the compared detectors and the data set in the report."""
    compare(folder, *words, "--resamples", 5, "--observe", 1)
    assert ((output or folder) / "report.html").is_file()
    content = json.loads(((output or folder) / "report.json").read_text())
    return [row["name"] for row in content["rows"]], content["dataset"]


def test_a_run_alone_is_enough(trained, tmp_path):
    names, dataset = written_by(trained)
    assert names == ["teacher", "distilled"] and dataset["images"] == 3
    assert dataset["name"] == f"tiny_{tmp_path / 'other'}"


def test_a_run_without_test_data_is_compared_on_others(trained, data, tmp_path):  # noqa: F811
    config = load(str(trained / "config.yaml"))
    del config.dataloader.test["dataset"]
    save_config(config, trained / "config.yaml")
    left, there = sorted(trained.rglob("*")), tmp_path / "there"
    words = ["--dataset", f"tiny_{data}", "--output", there]
    names, dataset = written_by(trained, *words, output=there)
    assert names == ["teacher", "distilled"] and dataset["images"] == 6
    assert dataset["name"] == f"tiny_{data}" and sorted(trained.rglob("*")) == left


def test_data_that_only_the_recipe_of_a_run_knows(trained, study, tmp_path):  # noqa: F811
    name = f"tiny_{tmp_path / 'other'}"
    assert name not in DatasetCatalog.list()
    detectors, dataset = detectors_from_folder(trained, name)
    assert dataset == name and name in DatasetCatalog.list() and len(detectors) == 2
    detectors, dataset = detectors_from_folder(study, "another")
    assert dataset == "another" and [d.name for d in detectors] == ["teacher", "baseline", "tar"]


@pytest.mark.sweep
def test_a_study_alone_is_enough(study):  # noqa: F811
    assert written_by(study)[0] == ["teacher", "baseline", "tar"]
    content = json.loads((study / "results.json").read_text()) | {"featured": "weak"}
    write_json(study / "results.json", content)
    assert written_by(study)[0] == ["teacher", "baseline", "weak"]


def test_a_study_ends_with_it(study, data, capsys):  # noqa: F811
    rows = json.loads((study / "results.json").read_text())["rows"]
    requested = Study(runs={}, test=named(data), baseline="baseline")
    assert study_report(study, requested, rows) == study / "report.html"
    assert "regions and features" in capsys.readouterr().out
    assert study_report(study, requested, rows[:2]) is None  # nothing was distilled


@pytest.mark.parametrize(
    "words, line",
    [
        ([], "neither a folder nor a detector"),
        (["somewhere", "--detector", "a=b,c"], "both a folder and detectors"),
        (["--detector", "a=b,c"], "--output"),
        (["--detector", "a=b,c", "--output", "x"], "--dataset"),
        (["--detector", "a=b", "--output", "x", "--dataset", "d"], "--detector: a=b;"),
        (["--detector", "a=no.py,w", "--output", "x", "--dataset", "d"], "no.py: no such config"),
        (["no/folder"], "config.yaml: no such file"),
        (["somewhere", "--resamples", "0"], "--resamples: 0"),
    ],
)
def test_bad_input_ends_in_one_line(words, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert line in refusal(command("compare"), words, capsys)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_data_set_and_a_broken_study_are_named(study, tmp_path, capsys):  # noqa: F811
    def error(*words):
        return refusal(command("compare"), words, capsys)

    assert "'nowhere'" in error(study, "--dataset", "nowhere")
    whole = (study / "tar_seed0/config.yaml").read_text()
    for content in (whole[: len(whole) // 2], "model: [", "model:", "- model", "", "\0"):
        (study / "tar_seed0/config.yaml").write_text(content)
        assert "tar_seed0/config.yaml: " in error(study)
        assert "tar_seed0/config.yaml: " in error(study / "tar_seed0")
    for content in ("{}", "[]", "[", '"rows"'):
        (study / "results.json").write_text(content)
        assert "results.json: no rows" in error(study)
    (tmp_path / "broken.py").write_text("model = nope")
    detector = f"a={tmp_path / 'broken.py'},weights.pth"
    words = ["--detector", detector, "--output", tmp_path / "report", "--dataset", "some"]
    line = "broken.py: does not load (NameError: name 'nope' is not defined)"
    assert line in error(*words)
