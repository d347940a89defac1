"""Where the code refuses bad input, read from its source; and which of these places a test has met."""

from __future__ import annotations

import ast
import contextlib
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from d2kd.errors import InputError

ROOT = Path(__file__).parent.parent


class Site(NamedTuple):
    """An ``InputError(…)`` in the source; its key survives everything but a change of its own words."""

    file: str
    first: int
    last: int
    key: str


@functools.cache
def sites() -> tuple[Site, ...]:
    """All of them, in ``d2kd/``."""
    found: list[Site] = []
    for path in sorted(ROOT.glob("d2kd/**/*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name != "d2kd/errors.py":
            _collect(ast.parse(path.read_text()), name, (), found)
    return tuple(found)


def _collect(node: ast.AST, file: str, inside: tuple[str, ...], found: list[Site]) -> None:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Call) and getattr(child.func, "id", None) == "InputError":
            words = ", ".join(ast.unparse(argument) for argument in child.args)
            key = plain_quotes(f"{file} {'.'.join(inside)}: {words}")
            found.append(Site(file, child.lineno, child.end_lineno or child.lineno, key))
        named = isinstance(child, ast.FunctionDef | ast.ClassDef)
        _collect(child, file, (*inside, child.name) if named else inside, found)


def plain_quotes(words: str) -> str:
    """Source with one kind of quotes: which of them stand in an f-string depends on Python's version."""
    return words.replace('"', "'")


def site_at(file: str, line: int) -> str | None:
    """The key of the site that a frame stands in."""
    for site in sites():
        if file == str(ROOT / site.file) and site.first <= line <= site.last:
            return site.key
    return None


@contextlib.contextmanager
def recorded() -> Iterator[dict[str, str]]:
    """While the block runs, the errors that are made: what each says, by the key of its site."""
    met: dict[str, str] = {}
    original = InputError.__init__

    def noting(self, *arguments):
        original(self, *arguments)
        frame = sys._getframe(1)
        key = site_at(frame.f_code.co_filename, frame.f_lineno)
        if key is not None:
            met[key] = str(self)

    InputError.__init__ = noting
    try:
        yield met
    finally:
        InputError.__init__ = original
