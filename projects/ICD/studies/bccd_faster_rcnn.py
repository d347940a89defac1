"""The study of ``bccd_retinanet.py`` with Faster R-CNN."""

from ....configs.common.study import blood_cells
from .bccd_retinanet import STUDENT_STEPS, TEACHER_STEPS
from .common import compared, study_of

_student, _teacher, _options = blood_cells(
    "baselines/faster_rcnn_small_bccd.py", STUDENT_STEPS, TEACHER_STEPS
)
runs = compared(_student, _teacher, inherit=["backbone.fpn_", "proposal_generator.", "roi_heads."])
study = study_of(
    runs, title="ICD on blood cells: Faster R-CNN, a thin student and its teacher", **_options
)
