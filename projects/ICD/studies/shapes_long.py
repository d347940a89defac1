"""ICD on generated shapes where the baseline has little left to gain by more steps.

The Faster R-CNNs of TAR's ``shapes_long.py`` and its steps, so that the two methods' tables can be laid side by side;
ICD's settings are those of ``shapes.py``, nothing was tuned for it. Some hours on two cores for each seed.
"""

from ....configs.common.study import fast_shapes, thin, wide
from ...TAR.studies.shapes_long import STUDENT_STEPS, TEACHER_STEPS
from .common import compared, study_of

_baseline = "baselines/faster_rcnn_small_shapes.py"
_student, _teacher = thin(_baseline, STUDENT_STEPS), wide(_baseline, TEACHER_STEPS)
for _recipe in (_student, _teacher):
    _recipe.train.eval_period, _recipe.train.log_period = 1000, 50
runs = compared(_student, _teacher, ["backbone.fpn_", "proposal_generator.", "roi_heads."])
study = study_of(
    runs,
    title="ICD on generated shapes, a long schedule: Faster R-CNN, a thin student and its teacher",
    test="shapes_test",
    seeds=[0],
    **fast_shapes,
)
