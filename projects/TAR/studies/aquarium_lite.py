"""The methods of ``aquarium.py`` for a pretrained student: EfficientNet-Lite0 beside Lite2 on larger images.

The student sees 256 x 192 pixels, its teacher 384 x 288. Both begin with ImageNet weights.
"""

from ....configs.common.study import aquarium_options, default_runs, student_recipe
from .aquarium import lite2
from .common import make_study

STUDENT_STEPS, TEACHER_STEPS, SIDE, SCALE = 3000, 4000, 384, 1.5

_student = student_recipe("baselines/faster_rcnn_efficientnet_lite0_aquarium.py", STUDENT_STEPS)
_resize = _student.dataloader.train.mapper.augmentations[0]
_resize.short_edge_length, _resize.max_size = SIDE * 3 // 4, SIDE  # the teacher's; scaled below

runs = default_runs(_student, lite2(TEACHER_STEPS, SIDE), scale=SCALE)
study = make_study(
    runs,
    title="Aquarium: EfficientNet-Lite0 at 256 pixels, its teacher Lite2 at 384, both pretrained",
    **aquarium_options(_student),
)
