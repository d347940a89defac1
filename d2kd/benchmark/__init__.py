"""Time and memory cost of distillation; see :mod:`d2kd.benchmark.bench` and :mod:`d2kd.benchmark.step_cost`."""

from .bench import DETECTRON2, DISTILLED, STUDENT, TEACHER, Bench, BenchmarkCase
from .costs import MAIN_RATIO, benchmark, format_costs

__all__ = [
    "DETECTRON2",
    "DISTILLED",
    "MAIN_RATIO",
    "STUDENT",
    "TEACHER",
    "Bench",
    "BenchmarkCase",
    "benchmark",
    "format_costs",
]
