"""Training and evaluation by a recipe."""

from .evaluation import build_evaluator, build_recipe_test_loader, do_test
from .hooks import BestCheckpoint, DrawDetections, EvalTeacher
from .optimizer import params_with_backbone_lr
from .trainer import Trainer

__all__ = [
    "BestCheckpoint",
    "DrawDetections",
    "EvalTeacher",
    "Trainer",
    "build_evaluator",
    "build_recipe_test_loader",
    "do_test",
    "params_with_backbone_lr",
]
