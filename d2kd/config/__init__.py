"""Load configs, take detectors from any of Detectron2's config formats, and make distillation recipes."""

from .files import (
    add_d2kd_config,
    config_file,
    detector,
    from_yacs,
    get_config,
    load,
    override,
    recipe_of,
    test_mapper,
)
from .nodes import (
    builds,
    is_distiller,
    reading_mapper,
    student_of,
    teacher_of,
    without_priors,
    without_weights,
)
from .recipes import METHODS, Recipe, distill, increment, method, reduced
from .train import Train, train_defaults, with_defaults

__all__ = [
    "METHODS",
    "Recipe",
    "Train",
    "add_d2kd_config",
    "builds",
    "config_file",
    "detector",
    "distill",
    "from_yacs",
    "get_config",
    "increment",
    "is_distiller",
    "load",
    "method",
    "override",
    "reading_mapper",
    "recipe_of",
    "reduced",
    "student_of",
    "teacher_of",
    "test_mapper",
    "train_defaults",
    "with_defaults",
    "without_priors",
    "without_weights",
]
