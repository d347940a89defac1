"""TAR on generated shapes: MobileNetV3 from ResNet."""

from ....configs.common.study import fast_shapes, student_recipe, teacher_recipe
from .common import compared, study_of

STUDENT_STEPS, TEACHER_STEPS = 550, 1000

runs = compared(
    student_recipe("baselines/faster_rcnn_mobilenet_v3_shapes.py", STUDENT_STEPS),
    teacher_recipe("baselines/faster_rcnn_small_shapes.py", TEACHER_STEPS),
)
study = study_of(
    runs,
    title="MobileNetV3-Small from a ResNet, on generated shapes",
    test="shapes_test",
    seeds=[0],
    **fast_shapes,
)
