"""The study of ``bccd_retinanet.py`` with Faster R-CNN."""

from ....configs.common.study import bccd_recipes
from .bccd_retinanet import STUDENT_STEPS, TEACHER_STEPS
from .common import comparison_runs, make_study

_student, _teacher, _options = bccd_recipes(
    "baselines/faster_rcnn_small_bccd.py", STUDENT_STEPS, TEACHER_STEPS
)
runs = comparison_runs(
    _student, _teacher, inherit=["backbone.fpn_", "proposal_generator.", "roi_heads."]
)
study = make_study(
    runs, title="ICD on blood cells: Faster R-CNN, a thin student and its teacher", **_options
)
