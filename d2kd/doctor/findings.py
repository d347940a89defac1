"""What was found, in lines of one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

STATES = ("ok", "warning", "error")


@dataclass(frozen=True)
class Finding:
    """A line.

    Args:
        subject: what was looked at.
        state: "ok", "warning" (it may be meant so) or "error" (it cannot be).
        found: what is there.
        advice: what to do.
    """

    subject: str
    state: str
    found: str
    advice: str = ""


def exit_code(findings: Sequence[Finding]) -> int:
    """0: all is well; 1: there are warnings; 2: there are errors."""
    return max((STATES.index(finding.state) for finding in findings), default=0)


def table(findings: Sequence[Finding]) -> str:
    """The lines, one below the other; what to do stands below what was found."""
    width = max((len(finding.subject) for finding in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:<7}  {finding.subject:<{width}}  {finding.found}")
        if finding.advice:
            lines.append(f"{'':<7}  {'':<{width}}  -> {finding.advice}")
    return "\n".join(lines)
