"""Every place that refuses bad input does so in one line, and before anything that lay there has changed."""

import ast
import logging
from pathlib import Path

import pytest

from d2kd import benchmark
from d2kd.engine.run_info import LOGGERS
from d2kd.errors import InputError, need, reporting

from .bad_input import CASES, ELSEWHERE, forgotten
from .raise_sites import plain_quotes, recorded, sites

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def quiet():
    for name in LOGGERS:  # or a trainer would add a handler on pytest's stdout of the moment
        logging.getLogger(name).setLevel(logging.INFO)


def places(name: str) -> list[str]:
    """The keys of the sites that a name of the table means."""
    where, _, words = plain_quotes(name).partition(": ")
    module, function = where.split(" ")
    module = module if module.startswith("tools/") else f"d2kd/{module}"
    head = f"{module}.py {function}: "
    keys = {site.key for site in sites()}
    return [key for key in keys if key.startswith(head) and words in key.removeprefix(head)]


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused(name, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "case").mkdir()
    (tmp_path / "keepsake.txt").write_text("written before")
    with forgotten():
        act = CASES[name](tmp_path / "case")
        before = {p: p.read_bytes() if p.is_file() else None for p in tmp_path.rglob("*")}
        capfd.readouterr()
        with recorded() as met, pytest.raises(SystemExit) as exit, reporting():
            act()
    assert exit.value.code == 2
    line = capfd.readouterr().err.splitlines()[-1]
    (place,) = places(name)
    assert list(met)[-1:] == [place], f"refused elsewhere: {met}"
    assert line == f"error: {met[place]}"
    assert all(line.removeprefix("error: ").partition("; expected "))
    after = {p: p.read_bytes() if p.is_file() else None for p in tmp_path.rglob("*")}
    assert after == before


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
