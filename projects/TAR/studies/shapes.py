"""Does TAR improve a small detector on generated shapes, and more than a longer training of the same time?

A small Faster R-CNN is trained without a teacher, without a teacher for the time of TAR, with feature imitation, and
with TAR. The schedule is short, so that one seed takes twenty minutes on two cores; short schedules exaggerate the
gain of any method.
"""

from ....configs.common.study import fast_shapes, student_recipe, teacher_recipe
from .common import comparison_runs, make_study

STUDENT_STEPS, TEACHER_STEPS = 550, 1000

_baseline = "baselines/faster_rcnn_small_shapes.py"
runs = comparison_runs(
    student_recipe(_baseline, STUDENT_STEPS),
    teacher_recipe(_baseline, TEACHER_STEPS),
    inherit=["backbone.fpn_", "proposal_generator.", "roi_heads."],
)
study = make_study(
    runs,
    title="TAR on generated shapes: Faster R-CNN, a thin student and its teacher",
    test="shapes_test",
    seeds=[0],
    **fast_shapes,
)
