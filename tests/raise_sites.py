"""Which ``InputError(…)`` of ``d2kd/`` no test has met: ``pytest -p tests.raise_sites`` ends with their lines.

It fails if there is one, so it is for the whole suite. Processes that a test starts are not looked into.
"""

import ast
import sys
from pathlib import Path

import pytest

import d2kd
from d2kd.utils.errors import InputError

SOURCE = Path(d2kd.__file__).parent
_init = InputError.__init__
_met: set[tuple[str, int]] = set()


def _noting(self, *parts):
    _init(self, *parts)
    frame = sys._getframe(1)
    if all(self.args):
        _met.add((frame.f_code.co_filename, frame.f_lineno))


def _sites() -> set[tuple[str, int]]:
    """File and first line of each."""
    return {
        (str(path), node.lineno)
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "InputError"
    }


def pytest_configure():
    InputError.__init__ = _noting


def pytest_unconfigure():
    InputError.__init__ = _init


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # one of xdist's processes, which hands over
        session.config.workeroutput["met"] = list(_met)
    elif session.exitstatus == 0 and not _sites() <= _met:
        session.exitstatus = 1


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    _met.update(map(tuple, getattr(node, "workeroutput", {}).get("met", ())))


def pytest_terminal_summary(terminalreporter):
    sites = _sites()
    terminalreporter.section(f"{len(sites)} places refuse input, {len(sites - _met)} not met")
    for path, line in sorted(sites - _met):
        terminalreporter.line(f"{path}:{line}")
