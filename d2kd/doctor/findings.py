"""The results of the checks, and their table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
