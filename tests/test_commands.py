"""The long checks as commands: a fault gives an exit code for scripts and a line that names it."""

import ast
import json
import logging
import sys
from pathlib import Path

import pytest

from d2kd.data import shapes

from . import coco_size, fuzz, kill_runs, label_throughput, resume_runs, two_processes


@pytest.fixture
def exit_code(monkeypatch):
    """Of ``python -m`` a module, with what a test has put in the place of its work."""
    # It would last beyond the test.
    monkeypatch.setattr(logging, "disable", lambda level: None)

    def run(module, *words):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
        last = ast.parse(Path(module.__file__).read_text()).body[-1]
        assert ast.unparse(last.test) == "__name__ == '__main__'"
        block = ast.Module(last.body, type_ignores=[])
        with pytest.raises(SystemExit) as exit:
            exec(compile(block, module.__file__, "exec"), vars(module))
        return exit.value.code

    return run


def test_a_resumed_run_that_differs(exit_code, monkeypatch, capsys):
    found, compared = {}, []

    def compare(name, data, folder):
        compared.append(name)
        assert (data / "data.json").is_file()
        return found.get(name, [])

    monkeypatch.setattr(resume_runs, "compare", compare)
    cases = len(resume_runs.CASES)
    assert exit_code(resume_runs) == 0 and compared == list(resume_runs.CASES)
    assert f"{cases} of {cases} resumed runs are" in capsys.readouterr().out
    found["tar"] = ["losses.3", "model_final.pth.model"]
    assert exit_code(resume_runs) == 1
    out = capsys.readouterr().out
    assert "differs in 2, such as losses.3" in out
    assert f"{cases - 1} of {cases} resumed runs are" in out


def test_a_killed_run_that_ends_otherwise(exit_code, monkeypatch, capsys):
    requested, outcome = [], kill_runs.Outcome(kills={"half written": 3}, finished=1)

    def kill(kills, seed, data, folder):
        requested.append((kills, seed))
        assert (data / "data.json").is_file()
        return outcome

    monkeypatch.setattr(kill_runs, "kill", kill)
    assert exit_code(kill_runs, "--kills", 3, "--seed", 7) == 0 and requested == [(3, 7)]
    printed = capsys.readouterr().out
    assert "3 kills (half written: 3)" in printed and "0 faults" in printed
    outcome.faults.append("run 0 began at 4 and not at 6")
    assert exit_code(kill_runs) == 1
    printed = capsys.readouterr().out
    assert "fault: run 0 began at 4 and not at 6" in printed and "1 faults" in printed


def test_two_processes_that_are_not_as_one(exit_code, monkeypatch, capsys):
    verdicts = {"loss of erd": "", "evaluation": ""}
    monkeypatch.setattr(two_processes, "compare", lambda folder: verdicts)
    assert exit_code(two_processes) == 0
    assert "2 of 2 comparisons" in capsys.readouterr().out
    verdicts["loss of erd"] = "apart by 1.0e-03"
    assert exit_code(two_processes) == 1
    printed = capsys.readouterr().out
    assert "loss of erd: apart by 1.0e-03" in printed and "evaluation: holds" in printed
    assert "1 of 2 comparisons" in printed


def test_an_example_that_is_not_finite(exit_code, monkeypatch, capsys):
    calls, look = [], fuzz.fuzz

    def bad(data):
        raise AssertionError("bad is not finite")

    monkeypatch.setattr(fuzz, "fuzz", lambda *args: calls.append(args) or look(*args))
    monkeypatch.setattr(fuzz, "CHECKS", {"good": lambda data: None})
    assert exit_code(fuzz, "--examples", 3) == 0
    assert "all finite" in capsys.readouterr().out
    monkeypatch.setattr(fuzz, "CHECKS", {"bad": bad, **fuzz.CHECKS})
    assert exit_code(fuzz, "--examples", 3, "--random") == 1
    out = capsys.readouterr().out
    assert "bad is not finite" in out and "good" in out and ": 1 not finite" in out
    assert calls == [("good", 3, True), ("bad", 3, False), ("good", 3, False)]


def test_a_comparison_of_any_size(monkeypatch, tmp_path, capsys):
    """Which has no fault to find: it measures, and leaves its page."""
    words = ["--images", 12, "--classes", 4, "--detectors", 2, "--output", tmp_path]
    monkeypatch.setattr(sys, "argv", ["coco_size", *map(str, words)])
    coco_size.main()
    printed = capsys.readouterr().out
    assert printed.startswith("12 images, ") and f"MiB in {tmp_path}" in printed
    content = json.loads((tmp_path / "report.json").read_text())
    assert [row["name"] for row in content["rows"]] == ["detector 0", "detector 1"]
    assert content["dataset"]["images"] == 12 and len(content["compared_classes"]) == 4
    assert (tmp_path / "report.html").is_file()


def test_labels_that_are_slow(exit_code, monkeypatch, capsys):
    try:
        for least, code in ((0.0, 0), (100.0, 1)):
            monkeypatch.setattr(label_throughput, "LEAST", least)
            assert exit_code(label_throughput, "--images", 3, "--rounds", 1) == code
            printed = capsys.readouterr().out
            assert "3 images, 300 labels" in printed and "images per CPU second: median" in printed
    finally:
        shapes.register_shapes()
