"""Does ICD improve a small RetinaNet on photographs of blood cells, with real annotations and their errors?

The runs are those of ``shapes.py``, on the data in D2KD_BCCD. No setting is chosen on ``test``, on which only the final
weights are evaluated: learning rates are from ``val`` with another seed, ICD's settings are those of ``shapes.py``.
"""

from ....configs.common.study import bccd_recipes
from .common import comparison_runs, make_study

STUDENT_STEPS, TEACHER_STEPS = 600, 1000

_student, _teacher, _options = bccd_recipes(
    "baselines/retinanet_small_bccd.py", STUDENT_STEPS, TEACHER_STEPS
)
runs = comparison_runs(
    _student, _teacher, inherit=["backbone.fpn_", "backbone.top_block.", "head."]
)
study = make_study(
    runs, title="ICD on blood cells: RetinaNet, a thin student and its teacher", **_options
)
