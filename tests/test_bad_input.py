"""Every place that refuses bad input does so in one line, and before anything that lay there has changed."""

import ast
from pathlib import Path

import pytest

from d2kd import benchmark
from d2kd.errors import InputError, need, reporting

from .bad_input import CASES, ELSEWHERE, outcome, places
from .old_raise_sites import sites

HERE = Path(__file__).parent


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (place,) = places(name)
    line, faults = outcome(CASES[name], place, tmp_path)
    assert not faults, line


def test_what_is_not_refused_as_it_must_be_is_a_fault(tmp_path, monkeypatch):
    def spoiling(folder):
        return lambda: (folder.parent / "keepsake.txt").write_text("changed")

    def wordless(folder):
        def act():
            raise InputError("", "", "")

        return act

    for case, expected in (
        (spoiling, {"exit code None", "refused elsewhere: []", "not all parts", "files changed"}),
        (wordless, {"refused elsewhere: []", "not its own words", "not all parts"}),
    ):
        folder = tmp_path / case.__name__
        folder.mkdir()
        monkeypatch.chdir(folder)
        assert expected <= set(outcome(case, "a place", folder).faults)


def test_every_place_has_a_case():
    """A new InputError wants a new case: the message lists the places that have none."""
    named = {name: places(name) for name in (*CASES, *ELSEWHERE)}
    unclear = {name: keys for name, keys in named.items() if len(keys) != 1}
    assert not unclear, "a name must mean one place"
    without = {site.key for site in sites()} - {key for (key,) in named.values()}
    assert not without, "\n".join(["without a case:", *sorted(without)])


def test_the_tests_elsewhere_exist():
    for test in ELSEWHERE.values():
        file, name = test.split(".")
        tree = ast.parse((HERE / f"{file}.py").read_text())
        assert name in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)], test


def test_every_place_is_told_by_its_words():
    keys = [site.key for site in sites()]
    assert len(keys) == len(set(keys)) > 180


def test_an_untrained_detector_that_explodes(monkeypatch):
    def explode(*_):
        raise FloatingPointError("boxes are not finite")

    monkeypatch.setattr(benchmark.bench, "measure_statistics", explode)
    with pytest.raises(InputError, match="boxes are not finite; expected untrained detectors"):
        benchmark.Bench(
            benchmark.Setup(
                "it", "projects/TAR/configs/tar_shapes.py", image_sizes=((64, 64),), device="cpu"
            )
        )


def test_a_package_of_an_extra_is_asked_for_before_work_starts():
    need("plots", "json", "torch")
    with pytest.raises(InputError) as error:
        need("plots", "json", "no_such_package")
    assert str(error.value) == 'no_such_package: not installed; expected pip install "d2kd[plots]"'


def test_an_interruption_says_what_goes_on(capsys):
    with pytest.raises(SystemExit) as exit, reporting(interrupted="the same command continues"):
        raise KeyboardInterrupt
    assert exit.value.code == 130 and "the same command continues" in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt), reporting():
        raise KeyboardInterrupt
