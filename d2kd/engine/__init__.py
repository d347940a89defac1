"""Training and measuring what a recipe says."""

from .evaluation import build_evaluator, build_test_loader, do_test
from .hooks import BestCheckpoint, EvalTeacher
from .trainer import Trainer

__all__ = [
    "BestCheckpoint",
    "EvalTeacher",
    "Trainer",
    "build_evaluator",
    "build_test_loader",
    "do_test",
]
