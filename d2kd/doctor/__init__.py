"""Sanity checks of a recipe before training. Each reports ok, a warning or an error, with advice.

``d2kd doctor`` runs all checks; ``d2kd train`` runs those that need no extra time.
"""

from .diagnose import diagnose
from .findings import Finding, exit_code, format_findings
from .static_checks import SanityCheckHook, sanity_check

__all__ = ["Finding", "SanityCheckHook", "diagnose", "exit_code", "format_findings", "sanity_check"]
