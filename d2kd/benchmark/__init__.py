"""Time and memory cost of distillation; see :mod:`d2kd.benchmark.bench` and :mod:`d2kd.benchmark.step_cost`."""

from .bench import DETECTRON2, DISTILLED, STUDENT, TEACHER, Bench, Case
from .costs import MAIN_RATIO, benchmark, table

__all__ = [
    "DETECTRON2",
    "DISTILLED",
    "MAIN_RATIO",
    "STUDENT",
    "TEACHER",
    "Bench",
    "Case",
    "benchmark",
    "table",
]
