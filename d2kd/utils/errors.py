"""Errors in the user's input, reported in one line.

Library code raises :class:`InputError`. Command-line tools run inside :func:`report_input_errors`, which prints
``error: <culprit>: <found>; expected <…>`` to stderr and exits with code 2.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator


class InputError(Exception):
    """Invalid input of the user.

    Args:
        culprit: the file, key or name at fault, as the user has written it.
        found: its value, or what is wrong with it.
        expected: a description of valid values.
    """

    def __init__(self, culprit: object, found: object, expected: object):
        # All three are passed to Exception, so that the error can be pickled between processes.
        super().__init__(str(culprit), str(found), str(expected))
        self.culprit, self.found, self.expected = self.args

    def __str__(self) -> str:
        line = f"{self.culprit}: {self.found}; expected {self.expected}"
        return " ".join(line.split())

    @classmethod
    def from_line(cls, line: str) -> InputError:
        """Parse the line printed for an error in another process."""
        rest, _, expected = line.rpartition("; expected ")
        culprit, _, found = rest.partition(": ")
        return cls(culprit, found, expected)


class TrainingInterrupted(KeyboardInterrupt):
    """Training, or other work that can be resumed, was stopped by a signal, after all processes saved what is finished.

    Args:
        message: how to continue; "" in all processes but the main one.
        exit_code: of the process.
    """

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def quoted(names: Iterable[object], most: int = 20) -> str:
    """Return names in quotes, so that spaces at their ends are seen; of many the first ones."""
    names = [repr(name if len(str(name)) <= 80 else f"{str(name)[:79]}…") for name in names]
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return ", ".join(names[:most] + more)


@contextlib.contextmanager
def report_input_errors(debug: bool = False, interrupted: str | None = None) -> Iterator[None]:
    """Report an :class:`InputError` that is raised inside in one line, and exit with code 2.

    A :class:`TrainingInterrupted` is reported in one line, too, with its own exit code.

    Args:
        debug: whether to raise the error with its traceback instead.
        interrupted: message after a KeyboardInterrupt, for work that can be resumed; the exit code is then 130.
    """
    try:
        yield
    except InputError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except TrainingInterrupted as error:
        if str(error):
            print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        if interrupted is None:
            raise
        print(f"\n{interrupted}")
        raise SystemExit(130) from None


def require_packages(extra: str, *modules: str) -> None:
    """Check that optional packages are installed, before work begins that needs them.

    Args:
        extra: name of the extra in ``setup.py`` that installs them.
        modules: names of the modules to import.

    Raises:
        InputError: a module is missing.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise InputError(module, "not installed", f'pip install "d2kd[{extra}]"')
