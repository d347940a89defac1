"""HTML report of a comparison."""

from .page import write_report

__all__ = ["write_report"]
