"""How input is refused: what a user reads, and that every place that refuses is met by a test."""

import re
import textwrap
from types import SimpleNamespace as Like

import pytest

from d2kd.utils.errors import InputError, report_input_errors, require_packages

from . import raise_sites


def test_a_package_of_an_extra_is_wanted_before_work_starts(refuses):
    require_packages("plots", "json", "torch")
    said = re.escape('no_such_package: not installed; expected pip install "d2kd[plots]"')
    refuses(lambda: require_packages("plots", "json", "no_such_package"), said)


def test_an_interruption_says_what_goes_on(capsys):
    with (
        pytest.raises(SystemExit) as exit,
        report_input_errors(interrupted="the same command continues"),
    ):
        raise KeyboardInterrupt
    assert exit.value.code == 130 and "the same command continues" in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt), report_input_errors():
        raise KeyboardInterrupt


def test_what_is_not_refused_as_it_must_be_fails(refuses, tmp_path):
    def spoil():
        (tmp_path / "new.txt").touch()
        raise InputError("it", "spoilt", "no change")

    def say(*parts):
        raise InputError(*parts)

    refuses(lambda: say("it", "odd", "even"), "it: odd")
    for act, match in (
        (spoil, "spoilt"),
        (lambda: say("it", "odd", "even"), "other words"),
        (lambda: say("it", "", "even"), ""),
        (lambda: say("it", "odd", ""), ""),
        (lambda: print("not refused"), ""),
    ):
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            refuses(act, match)


def test_a_place_that_no_test_meets_is_found(tmp_path, monkeypatch):
    source = """
        def half(n):
            if n < 0:
                raise InputError("n", n, "at least 0")
            if n % 2:
                raise InputError(
                    "n", n, "an even number"
                )
    """
    (tmp_path / "it.py").write_text(textwrap.dedent(source))
    monkeypatch.setattr(raise_sites, "SOURCE", tmp_path)
    monkeypatch.setattr(raise_sites, "_met", set())
    monkeypatch.setattr(InputError, "__init__", raise_sites._noting)
    module = {"InputError": InputError}
    exec(compile((tmp_path / "it.py").read_text(), tmp_path / "it.py", "exec"), module)

    def status(session):
        raise_sites.pytest_sessionfinish(session)
        return session.exitstatus

    for n, expected in ((-1, 1), (1, 0)):
        with pytest.raises(InputError):
            module["half"](n)
        assert status(Like(config=Like(), exitstatus=0)) == expected
    assert status(Like(config=Like(), exitstatus=2)) == 2
    # The same in two processes, of which one has run all tests.
    worker = Like(config=Like(workeroutput={}), exitstatus=0)
    assert status(worker) == 0
    monkeypatch.setattr(raise_sites, "_met", set())
    assert status(Like(config=Like(), exitstatus=0)) == 1
    raise_sites.pytest_testnodedown(worker.config)
    assert status(Like(config=Like(), exitstatus=0)) == 0


def test_a_line_is_the_error_that_it_was():
    error = InputError("a.py", "does not load (x: y; expected z)", "a LazyConfig")
    assert InputError.from_line(str(error)).args == error.args
