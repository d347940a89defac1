"""ICD on generated shapes with a long schedule, where the baseline gains little from more iterations.

Detectors and iterations are those of TAR's ``shapes_long.py``, so that the results of both methods are comparable.
ICD's settings are those of ``shapes.py``; none was tuned for this study. A seed takes several hours on two cores.
"""

from ....configs.common.study import fast_shapes, student_recipe, teacher_recipe
from ...TAR.studies.shapes_long import STUDENT_STEPS, TEACHER_STEPS
from .common import comparison_runs, make_study

_baseline = "baselines/faster_rcnn_small_shapes.py"
_student, _teacher = (
    student_recipe(_baseline, STUDENT_STEPS),
    teacher_recipe(_baseline, TEACHER_STEPS),
)
for _recipe in (_student, _teacher):
    _recipe.train.eval_period, _recipe.train.log_period = 1000, 50
runs = comparison_runs(_student, _teacher, ["backbone.fpn_", "proposal_generator.", "roi_heads."])
study = make_study(
    runs,
    title="ICD on generated shapes, a long schedule: Faster R-CNN, a thin student and its teacher",
    test="shapes_test",
    seeds=[0],
    **fast_shapes,
)
