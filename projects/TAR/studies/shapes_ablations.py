"""Which of TAR's parts earn their place: terms alone, with and without their gates, and all under three decays.

The detectors, the schedule and the weights of ``shapes.py``.
"""

import copy

from detectron2.config import LazyCall as L
from fvcore.common.param_scheduler import CosineParamScheduler

from d2kd.config import get_config
from d2kd.losses import DistillLosses

from ....configs.common.study import fast_shapes, taught, thin, wide
from .common import compared, study_of
from .shapes import STUDENT_STEPS, TEACHER_STEPS

_baseline = "baselines/faster_rcnn_small_shapes.py"
_student, _teacher = thin(_baseline, STUDENT_STEPS), wide(_baseline, TEACHER_STEPS)

VARIED = {
    "feature_box": dict(term="feature", mask="box"),
    "classification_any": dict(term="classification", cls_gate="none"),
    "regression_student": dict(term="regression", reg_gate="student"),
    "regression_both": dict(term="regression", reg_gate="both"),
    "regression_any": dict(term="regression", reg_gate="none"),
    "no_gates": dict(cls_gate="none", reg_gate="none"),
    "no_decay": dict(weight=1.0),
    "cosine_decay": dict(weight=L(CosineParamScheduler)(start_value=1.0, end_value=0.0)),
}


def varied(term=None, **options):
    """TAR with other options, of one term or of all."""
    tar = copy.deepcopy(get_config("projects/TAR/configs/tar_shapes.py").model.losses.tar)
    for other in {"feature", "classification", "regression"} - {term} if term else ():
        tar[f"{other}_weight"] = 0
    tar.update(options)
    return taught(_student, _teacher, losses=L(DistillLosses)(tar=tar))


# Every part is named here; what costs as much without a teacher, and imitation, are in shapes.py.
runs = {
    name: dict(run, optional=name in ("baseline_equal_time", "imitation"))
    for name, run in compared(_student, _teacher).items()
} | {name: varied(**options) for name, options in VARIED.items()}
study = study_of(
    runs,
    title="TAR's parts on generated shapes: Faster R-CNN, a thin student and its teacher",
    test="shapes_test",
    seeds=[0],
    **fast_shapes,
)
