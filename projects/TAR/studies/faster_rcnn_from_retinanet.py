"""Feature imitation on generated shapes: Faster R-CNN from RetinaNet."""

from ....configs.common.study import fast_shapes, student_recipe, teacher_recipe
from .common import comparison_runs, make_study

STUDENT_STEPS, TEACHER_STEPS = 550, 2000

runs = comparison_runs(
    student_recipe("baselines/faster_rcnn_small_shapes.py", STUDENT_STEPS),
    teacher_recipe("baselines/retinanet_small_shapes.py", TEACHER_STEPS, lr=2e-3),
    tar=False,
)
study = make_study(
    runs,
    title="Faster R-CNN from RetinaNet, on generated shapes",
    test="shapes_test",
    seeds=[0],
    **fast_shapes,
)
