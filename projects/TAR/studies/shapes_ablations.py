"""Ablations of TAR: single terms with and without their gates, and all terms with three weight schedules.

Detectors, schedule and loss weights are those of ``shapes.py``.
"""

from detectron2.config import LazyCall as L
from fvcore.common.param_scheduler import CosineParamScheduler

from ....configs.common.study import distillation_run, fast_shapes, student_recipe, teacher_recipe
from .common import comparison_runs, make_study, tar_losses
from .shapes import STUDENT_STEPS, TEACHER_STEPS

_baseline = "baselines/faster_rcnn_small_shapes.py"
_student, _teacher = (
    student_recipe(_baseline, STUDENT_STEPS),
    teacher_recipe(_baseline, TEACHER_STEPS),
)

ABLATIONS = {
    "feature_box": dict(term="feature", mask="box"),
    "classification_any": dict(term="classification", cls_gate="none"),
    "regression_student": dict(term="regression", reg_gate="student"),
    "regression_both": dict(term="regression", reg_gate="both"),
    "regression_any": dict(term="regression", reg_gate="none"),
    "no_gates": dict(cls_gate="none", reg_gate="none"),
    "no_decay": dict(weight=1.0),
    "cosine_decay": dict(weight=L(CosineParamScheduler)(start_value=1.0, end_value=0.0)),
}


# Ablations run by default; the baseline of equal time and imitation, which are in shapes.py, are optional.
runs = {
    name: dict(run, optional=name in ("baseline_equal_time", "imitation"))
    for name, run in comparison_runs(_student, _teacher).items()
} | {
    name: distillation_run(_student, _teacher, losses=tar_losses(**options))
    for name, options in ABLATIONS.items()
}
study = make_study(
    runs,
    title="TAR's parts on generated shapes: Faster R-CNN, a thin student and its teacher",
    test="shapes_test",
    seeds=[0],
    **fast_shapes,
)
