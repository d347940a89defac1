"""Does ICD help a small detector on the generated shapes, and what of it is the decoder's?

A RetinaNet with a thin backbone learns alone, alone for as long as ICD takes, beside a teacher by plain feature
imitation, and by ICD; then with the teacher's neck and head to start from, alone and by ICD; and by ICD with
uniform weights.
"""

from ....configs.common.study import fast_shapes, thin, wide
from .common import compared, study_of

STUDENT_STEPS, TEACHER_STEPS = 2000, 2000


def on_shapes(baseline, **options):
    """The runs and the study of a thin dense detector and its wider teacher."""
    runs = compared(
        # Each rate is the best of those tried on shapes_val, with RetinaNets.
        thin(baseline, STUDENT_STEPS),
        wide(baseline, TEACHER_STEPS, lr=2e-3),
        inherit=["backbone.fpn_", "backbone.top_block.", "head."],
        # No object is large enough for p7: only there to say no, the teacher's is eight times as strong as the others,
        # and a student that imitates it learns little else.
        levels=["p3", "p4", "p5", "p6"],
    )
    return runs, study_of(runs, test="shapes_test", **options, **fast_shapes)


runs, study = on_shapes(
    "baselines/retinanet_small_shapes.py",
    title="ICD on generated shapes: RetinaNet, a thin student and its teacher",
    seeds=[0, 1, 2],
)
