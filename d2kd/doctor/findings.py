"""The results of the checks, and their table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..utils.errors import InputError

STATES = ("ok", "warning", "error")


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Args:
        subject: what was checked.
        state: "ok", "warning" (possibly intended) or "error".
        found: the result.
        advice: how to fix it.
    """

    subject: str
    state: str
    found: str
    advice: str = ""


def guarded(
    subject: str, check: Callable[[], Iterable[Finding]], *, debug: bool = False
) -> Iterator[Finding]:
    """Yield the findings of a check; if it fails, that is one, so that it neither ends a run nor hides other checks.

    Args:
        subject: what is checked.
        check: a function without arguments.
        debug: whether to raise errors that are no :class:`InputError`.
    """
    try:
        yield from check()
    except InputError as error:
        yield Finding(subject, "error", f"{error.culprit}: {error.found}", error.expected)
    except Exception as error:
        if debug:
            raise
        found = " ".join(f"cannot be checked ({type(error).__name__}: {error})".split())
        yield Finding(subject, "error", found, "d2kd doctor --debug shows the traceback")


def exit_code(findings: Sequence[Finding]) -> int:
    """Return 0 if everything is ok, 1 if there are warnings, 2 if there are errors."""
    return max((STATES.index(finding.state) for finding in findings), default=0)


def format_findings(findings: Sequence[Finding]) -> str:
    """Return the findings as text, each with its advice below."""
    width = max((len(finding.subject) for finding in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:<7}  {finding.subject:<{width}}  {finding.found}")
        if finding.advice:
            lines.append(f"{'':<7}  {'':<{width}}  -> {finding.advice}")
    return "\n".join(lines)
