"""TAR with few labels: the student's runs have the labels of some training images, the teacher had those of all.

A teacher is often trained on more labelled images than there are for the student's task. So the teacher alone sees all
800 images with their labels. ``teacher_labels`` is trained on the student's images and, with the teacher's detections as
labels, on all others. The other runs are on the student's images alone.

The weights were chosen on ``shapes_val`` with another seed, of 0.3, 1, 3 and 10 for imitation, and of 0.3, 1, 3 and 6 for
TAR's features. They are larger than the defaults: so far below its teacher, a student gains from all that it can get.

The optional run ``baseline_twice`` shows that the student alone is flat: it trains for twice as many steps.
"""

import copy

from detectron2.config import LazyCall as L

from d2kd.data import shapes, subset

from ....configs.common.study import (
    default_runs,
    fast_shapes,
    student_recipe,
    teacher_labels,
    teacher_recipe,
)
from .common import make_study

IMAGES, WIDTH, STUDENT_STEPS = 100, 16, 600
TEACHER_WIDTH, TEACHER_BLOCKS, TEACHER_STEPS = 24, [1, 2, 2, 1], 700
MIN_SCORE = 0.5

_baseline = "baselines/faster_rcnn_small_shapes.py"
_student = student_recipe(_baseline, STUDENT_STEPS)
_student.model.backbone.bottom_up.width = WIDTH
_student.dataloader.train.dataset.names = L(subset)(dataset="shapes_train", images=IMAGES)
_others = L(subset)(dataset="shapes_train", images=IMAGES, complement=True)

# With --fast, too, there are images whose labels the student does not see.
_fast_data = L(shapes.register_shapes)(train=IMAGES + 20, val=16, test=24)
_fast = dict(fast_shapes, fast_setup=_fast_data)

_teacher = teacher_recipe(_baseline, TEACHER_STEPS)
_teacher.model.backbone.bottom_up.update(width=TEACHER_WIDTH, blocks=TEACHER_BLOCKS)

runs = default_runs(_student, _teacher, ["imitation", "tar"])
runs["imitation"]["config"]["model"].losses.imitation.weight = 10.0
runs["tar"]["config"]["model"].losses.tar.update(feature_weight=6.0, regression_weight=1.0)
_twice = copy.deepcopy(_student)
_twice.train.max_iter, _twice.train.eval_period = 2 * STUDENT_STEPS, STUDENT_STEPS
runs["baseline_twice"] = dict(config=_twice, optional=True)
runs["teacher_labels"] = teacher_labels(_student, _others, MIN_SCORE)
study = make_study(
    runs,
    title=f"TAR with {IMAGES} labelled images, on generated shapes",
    test="shapes_test",
    seeds=[0],
    **_fast,
)
