"""Load configs, take detectors from any of Detectron2's config formats, and make distillation recipes."""

from .files import (
    add_d2kd_config,
    apply_overrides,
    build_model_from_yacs,
    get_config,
    get_config_file,
    get_detector_config,
    get_test_mapper,
    load,
    load_recipe_or_none,
)
from .nodes import (
    Recipe,
    as_config,
    base_mapper,
    has_target,
    is_distiller,
    student_node,
    teacher_node,
    without_priors,
    without_weights,
)
from .recipes import (
    METHODS,
    distill,
    incremental_recipe,
    method,
    with_downscaled_student,
    with_timm_backbone,
)
from .train import Train, train_defaults, with_defaults

__all__ = [
    "METHODS",
    "Recipe",
    "Train",
    "add_d2kd_config",
    "apply_overrides",
    "as_config",
    "base_mapper",
    "build_model_from_yacs",
    "distill",
    "get_config",
    "get_config_file",
    "get_detector_config",
    "get_test_mapper",
    "has_target",
    "incremental_recipe",
    "is_distiller",
    "load",
    "load_recipe_or_none",
    "method",
    "student_node",
    "teacher_node",
    "train_defaults",
    "with_defaults",
    "with_downscaled_student",
    "with_timm_backbone",
    "without_priors",
    "without_weights",
]
