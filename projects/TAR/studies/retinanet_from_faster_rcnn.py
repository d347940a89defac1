"""Feature imitation on generated shapes: RetinaNet from Faster R-CNN."""

from ....configs.common.study import fast_shapes, thin, wide
from .common import compared, study_of

STUDENT_STEPS, TEACHER_STEPS = 2000, 1000

runs = compared(
    thin("baselines/retinanet_small_shapes.py", STUDENT_STEPS),
    wide("baselines/faster_rcnn_small_shapes.py", TEACHER_STEPS),
    tar=False,
)
study = study_of(
    runs,
    title="RetinaNet from Faster R-CNN, on generated shapes",
    test="shapes_test",
    seeds=[0],
    **fast_shapes,
)
