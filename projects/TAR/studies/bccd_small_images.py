"""TAR on blood cells with a student on downscaled images and a teacher on images twice as wide and high.

Detectors and the teacher's images are those of ``bccd.py``; the students' images are 160 x 120.
"""

from ....configs.common.study import bccd_recipes
from .bccd import STUDENT_STEPS, TEACHER_STEPS
from .common import comparison_runs, make_study

_student, _teacher, _options = bccd_recipes(
    "baselines/faster_rcnn_small_bccd.py", STUDENT_STEPS, TEACHER_STEPS
)
runs = comparison_runs(_student, _teacher, scale=2)
study = make_study(
    runs, title="TAR on blood cells: a student of half the pixels a side, Faster R-CNN", **_options
)
