"""Time and memory cost of distillation; see :mod:`d2kd.benchmark.bench` and :mod:`d2kd.benchmark.step_cost`."""

from .bench import DISTILLED, STOCK, STUDENT, TEACHER, Bench, Setup
from .costs import HEADLINE, benchmark, table

__all__ = [
    "DISTILLED",
    "HEADLINE",
    "STOCK",
    "STUDENT",
    "TEACHER",
    "Bench",
    "Setup",
    "benchmark",
    "table",
]
