"""Does TAR improve the masks of a small detector on generated shapes, and what does its mask term add?

A small Mask R-CNN is trained without a teacher, without a teacher for the time of TAR, with feature imitation, with TAR but
its mask term (``without_masks``), and with TAR. Schedule and loss weights are those of ``shapes.py``. The optional run
``tar_mask`` has the mask term alone.
"""

from ....configs.common.study import (
    control_runs,
    distillation_run,
    fast_shapes,
    student_recipe,
    teacher_recipe,
)
from .common import make_study, tar_losses
from .shapes import STUDENT_STEPS, TEACHER_STEPS

_baseline = "baselines/mask_rcnn_small_shapes.py"
_student, _teacher = (
    student_recipe(_baseline, STUDENT_STEPS),
    teacher_recipe(_baseline, TEACHER_STEPS),
)


def _tar(mask_weight=1.0, **options):
    losses = tar_losses(mask_weight=mask_weight, **options)
    return distillation_run(_student, _teacher, losses=losses)


runs = control_runs(_student, _teacher, match_time_of="tar")
runs["without_masks"] = _tar(mask_weight=0)
runs["tar"] = _tar()
runs["tar_mask"] = dict(_tar(term="mask"), optional=True)
study = make_study(
    runs,
    title="TAR and masks on generated shapes: Mask R-CNN, a thin student and its teacher",
    test="shapes_test",
    seeds=[0, 1],
    **fast_shapes,
)
