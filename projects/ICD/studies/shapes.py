"""Does ICD help a small detector on the generated shapes, and what of it is the decoder's?

A RetinaNet with a thin backbone learns alone, alone for as long as ICD takes, beside a teacher by plain feature
imitation, and by ICD; then with the teacher's neck and head to start from, alone and by ICD; and by ICD with
uniform weights.
"""

from ....configs.common.study import fast_shapes, thin, wide
from .common import compared, study_of

STUDENT_STEPS, TEACHER_STEPS = 2000, 2000

_baseline = "baselines/retinanet_small_shapes.py"
runs = compared(
    # Each rate is the best of those tried on shapes_val.
    thin(_baseline, STUDENT_STEPS),
    wide(_baseline, TEACHER_STEPS, lr=2e-3),
    inherit=["backbone.fpn_", "backbone.top_block.", "head."],
    # No object is large enough for p7: only there to say no, the teacher's is eight times as strong as the others, and
    # a student that imitates it learns little else.
    levels=["p3", "p4", "p5", "p6"],
)
study = study_of(
    runs,
    title="ICD on generated shapes: RetinaNet, a thin student and its teacher",
    test="shapes_test",
    seeds=[0, 1, 2],
    **fast_shapes,
)
