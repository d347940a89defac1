"""What a student of small images learns from a teacher of images twice as wide and high, on blood cells.

The detectors of ``bccd.py``, and its teacher's images; the students' are 160 x 120.
"""

from ....configs.common.study import blood_cells
from .bccd import STUDENT_STEPS, TEACHER_STEPS
from .common import compared, study_of

_student, _teacher, _options = blood_cells(
    "baselines/faster_rcnn_small_bccd.py", STUDENT_STEPS, TEACHER_STEPS
)
runs = compared(_student, _teacher, scale=2)
study = study_of(
    runs, title="TAR on blood cells: a student of half the pixels a side, Faster R-CNN", **_options
)
