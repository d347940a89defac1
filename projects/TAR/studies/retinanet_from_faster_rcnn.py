"""Feature imitation on generated shapes: RetinaNet from Faster R-CNN."""

from ....configs.common.study import fast_shapes, student_recipe, teacher_recipe
from .common import comparison_runs, make_study

STUDENT_STEPS, TEACHER_STEPS = 2000, 1000

runs = comparison_runs(
    student_recipe("baselines/retinanet_small_shapes.py", STUDENT_STEPS),
    teacher_recipe("baselines/faster_rcnn_small_shapes.py", TEACHER_STEPS),
    tar=False,
)
study = make_study(
    runs,
    title="RetinaNet from Faster R-CNN, on generated shapes",
    test="shapes_test",
    seeds=[0],
    **fast_shapes,
)
