"""ICD on the generated shapes once more, with FCOS: a detector whose rate and weights were not tuned.

Everything is as in ``shapes.py``.
"""

from ....configs.common.study import fast_shapes, thin, wide
from .common import compared, study_of

STUDENT_STEPS, TEACHER_STEPS = 2000, 2000

_baseline = "baselines/fcos_small_shapes.py"
runs = compared(
    thin(_baseline, STUDENT_STEPS),
    wide(_baseline, TEACHER_STEPS, lr=2e-3),
    inherit=["backbone.fpn_", "backbone.top_block.", "head."],
    levels=["p3", "p4", "p5", "p6"],
)
study = study_of(
    runs,
    title="ICD on generated shapes: FCOS, a thin student and its teacher",
    test="shapes_test",
    seeds=[0],
    **fast_shapes,
)
