"""Does ICD help a small RetinaNet on photographs: blood cells, with real annotations and their faults?

The runs of ``shapes.py``, on data that D2KD_BCCD points to. Nothing is chosen on ``test``, which is read once,
by a run's last weights: learning rates were on ``val`` with another seed, ICD's settings are those of ``shapes.py``.
"""

from ....configs.common.study import blood_cells
from .common import compared, study_of

STUDENT_STEPS, TEACHER_STEPS = 600, 1000

_student, _teacher, _options = blood_cells(
    "baselines/retinanet_small_bccd.py", STUDENT_STEPS, TEACHER_STEPS
)
runs = compared(_student, _teacher, inherit=["backbone.fpn_", "backbone.top_block.", "head."])
study = study_of(
    runs, title="ICD on blood cells: RetinaNet, a thin student and its teacher", **_options
)
