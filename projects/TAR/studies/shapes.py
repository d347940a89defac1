"""Does TAR help a small detector on the generated shapes, and more than what its seconds buy otherwise?

A Faster R-CNN with a thin backbone learns alone, alone for as long as TAR takes, beside a teacher by plain feature
imitation, and by TAR. The schedule is cut to fit one seed into twenty minutes on two cores, and short schedules
flatter every method.
"""

from ....configs.common.study import fast_shapes, thin, wide
from .common import compared, study_of

STUDENT_STEPS, TEACHER_STEPS = 550, 1000

_baseline = "baselines/faster_rcnn_small_shapes.py"
runs = compared(
    thin(_baseline, STUDENT_STEPS),
    wide(_baseline, TEACHER_STEPS),
    inherit=["backbone.fpn_", "proposal_generator.", "roi_heads."],
)
study = study_of(
    runs,
    title="TAR on generated shapes: Faster R-CNN, a thin student and its teacher",
    test="shapes_test",
    seeds=[0],
    **fast_shapes,
)
