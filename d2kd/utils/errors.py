"""One way to refuse bad input: a line that names the culprit, what was found and what was expected.

Library code raises :class:`InputError`; command lines run inside :func:`reporting`, which turns it into
``error: <culprit>: <found>; expected <…>`` on stderr and exit code 2.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator


class InputError(Exception):
    """Something the user gave cannot be used.

    Args:
        culprit: the file, key or name at fault, as the user wrote it.
        found: what is there.
        expected: what would have been right.
    """

    def __init__(self, culprit: object, found: object, expected: object):
        # All three reach Exception, so that the error survives pickling between processes.
        super().__init__(str(culprit), str(found), str(expected))
        self.culprit, self.found, self.expected = self.args

    def __str__(self) -> str:
        line = f"{self.culprit}: {self.found}; expected {self.expected}"
        return " ".join(line.split())

    @classmethod
    def of_line(cls, line: str) -> InputError:
        """The error that a line says, of another process: the opposite of ``str``."""
        said, _, expected = line.rpartition("; expected ")
        culprit, _, found = said.partition(": ")
        return cls(culprit, found, expected)


@contextlib.contextmanager
def reporting(debug: bool = False, interrupted: str | None = None) -> Iterator[None]:
    """Report an :class:`InputError` raised inside in one line and exit with code 2.

    Args:
        debug: the error passes through with its traceback.
        interrupted: what to say to a user who interrupts, for work that goes on where it stopped; exit code 130.
    """
    try:
        yield
    except InputError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        if interrupted is None:
            raise
        print(f"\n{interrupted}")
        raise SystemExit(130) from None


def need(extra: str, *modules: str) -> None:
    """Refuse to begin what would end without a package that is no requirement of the core.

    Args:
        extra: of ``setup.py``, that has them.
        modules: by the names they are imported by.

    Raises:
        InputError: one is missing.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise InputError(module, "not installed", f'pip install "d2kd[{extra}]"')
