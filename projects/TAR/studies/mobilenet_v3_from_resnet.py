"""TAR on generated shapes: MobileNetV3 from ResNet."""

from ....configs.common.study import fast_shapes, student_recipe, teacher_recipe
from .common import comparison_runs, make_study

STUDENT_STEPS, TEACHER_STEPS = 550, 1000

runs = comparison_runs(
    student_recipe("baselines/faster_rcnn_mobilenet_v3_shapes.py", STUDENT_STEPS),
    teacher_recipe("baselines/faster_rcnn_small_shapes.py", TEACHER_STEPS),
)
study = make_study(
    runs,
    title="MobileNetV3-Small from a ResNet, on generated shapes",
    test="shapes_test",
    seeds=[0],
    **fast_shapes,
)
