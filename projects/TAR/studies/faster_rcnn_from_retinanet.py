"""What a Faster R-CNN learns from the features of a RetinaNet, on the generated shapes."""

from ....configs.common.study import fast_shapes, thin, wide
from .common import compared, study_of

STUDENT_STEPS, TEACHER_STEPS = 550, 2000

runs = compared(
    thin("baselines/faster_rcnn_small_shapes.py", STUDENT_STEPS),
    wide("baselines/retinanet_small_shapes.py", TEACHER_STEPS, lr=2e-3),
    tar=False,
)
study = study_of(
    runs,
    title="Faster R-CNN from RetinaNet, on generated shapes",
    test="shapes_test",
    seeds=[0],
    **fast_shapes,
)
