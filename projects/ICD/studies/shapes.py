"""Does ICD improve a small detector on generated shapes, and how much of the gain is due to the decoder?

A small RetinaNet is trained without a teacher, without a teacher for the time of ICD, with feature imitation, and with
ICD; then with inherited neck and head, with and without ICD; and with ICD with uniform weights.
"""

from ....configs.common.study import fast_shapes, student_recipe, teacher_recipe
from .common import comparison_runs, make_study

STUDENT_STEPS, TEACHER_STEPS = 2000, 2000


def on_shapes(baseline, **options):
    """Return the runs and the study of a small dense detector and its wider teacher."""
    runs = comparison_runs(
        # Each learning rate is the best of those tried with RetinaNet on shapes_val.
        student_recipe(baseline, STUDENT_STEPS),
        teacher_recipe(baseline, TEACHER_STEPS, lr=2e-3),
        inherit=["backbone.fpn_", "backbone.top_block.", "head."],
        # No object is assigned to p7, where the teacher's features are eight times as large as on the other levels and
        # would dominate imitation.
        levels=["p3", "p4", "p5", "p6"],
    )
    return runs, make_study(runs, test="shapes_test", **options, **fast_shapes)


runs, study = on_shapes(
    "baselines/retinanet_small_shapes.py",
    title="ICD on generated shapes: RetinaNet, a thin student and its teacher",
    seeds=[0, 1, 2],
)
