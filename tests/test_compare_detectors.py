"""The command line of the comparison, and the report that ends a study."""

import json
import sys

import pytest

from d2kd.engine.run_info import write_json
from d2kd.study.plan import Study
from d2kd.study.report import study_report

from .common import load_tool, refusal, tiny_faster_rcnn
from .test_comparison import data, named, saved, study  # noqa: F401  (fixtures)


@pytest.fixture
def command(monkeypatch):
    tool = load_tool("compare_detectors")

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["compare_detectors.py", *map(str, words)])
        tool.main()

    return run


def test_detectors_by_config_and_weights(command, data, tmp_path, capsys):  # noqa: F811
    words = []
    for seed, name in enumerate(("teacher", "student")):
        config, weights = saved(tmp_path / name, data, tiny_faster_rcnn(), seed)
        words += ["--detector", f"{name}={config},{weights}"]
    output = tmp_path / "report"
    command(*words, "--dataset", named(data), "--output", output, "--resamples", 5)
    assert str(output / "report.html") in capsys.readouterr().out
    content = json.loads((output / "report.json").read_text())
    assert [row["name"] for row in content["rows"]] == ["teacher", "student"]
    assert content["resamples"] == 5


def test_a_study_alone_is_enough(command, study):  # noqa: F811
    command(study, "--resamples", 5, "--observe", 2)
    content = json.loads((study / "report.json").read_text())
    assert [row["name"] for row in content["rows"]] == ["teacher", "baseline", "tar"]
    assert (study / "report.html").is_file()
    write_json(
        study / "results.json",
        json.loads((study / "results.json").read_text()) | {"featured": "weak"},
    )
    command(study, "--resamples", 5, "--observe", 2)
    rows = json.loads((study / "report.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["teacher", "baseline", "weak"]


def test_a_study_ends_with_it(study, data, capsys):  # noqa: F811
    rows = json.loads((study / "results.json").read_text())["rows"]
    asked = Study(runs={}, test=named(data), baseline="baseline")
    assert study_report(study, asked, rows) == study / "report.html"
    assert "regions and features" in capsys.readouterr().out
    assert study_report(study, asked, rows[:2]) is None  # nothing was distilled


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
def test_bad_input_ends_in_one_line(command, words, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert line in refusal(lambda words: command(*words), words, capsys)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_data_set_and_a_broken_study_are_named(command, study, capsys):  # noqa: F811
    asked = lambda *words: refusal(lambda words: command(*words), words, capsys)  # noqa: E731
    assert "'nowhere'" in asked(study, "--dataset", "nowhere")
    whole = (study / "tar_seed0/config.yaml").read_text()
    for content in (whole[: len(whole) // 2], "model: [", "model:", "- model", "", "\0"):
        (study / "tar_seed0/config.yaml").write_text(content)
        assert "tar_seed0/config.yaml: " in asked(study)
        assert "tar_seed0/config.yaml: " in asked(study / "tar_seed0")
    for content in ("{}", "[]", "[", '"rows"'):
        (study / "results.json").write_text(content)
        assert "results.json: no rows" in asked(study)


def test_a_broken_recipe_is_named(command, tmp_path, capsys):
    (tmp_path / "broken.py").write_text("model = nope")
    detector = f"a={tmp_path / 'broken.py'},weights.pth"
    words = ["--detector", detector, "--output", tmp_path / "report", "--dataset", "some"]
    said = refusal(lambda words: command(*words), words, capsys)
    assert "broken.py: does not load (NameError: name 'nope' is not defined)" in said
