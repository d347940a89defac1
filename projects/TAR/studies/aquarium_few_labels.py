"""TAR with the labels of 80 photographs of an aquarium, beside the teacher's labels of the other 320.

The teacher, an EfficientNet-Lite2 on images of 384 x 288 pixels, had the labels of all 400. The student, a Lite0, sees
256 x 192 pixels. Both begin with ImageNet weights. ``all_labels`` is the bound: the student alone, with all labels.
"""

import copy

from detectron2.config import LazyCall as L

from d2kd.config import with_downscaled_student
from d2kd.data import subset

from ....configs.common.study import (
    aquarium_options,
    default_runs,
    student_recipe,
    teacher_labels,
)
from .aquarium import lite2
from .aquarium_lite import SCALE, SIDE, TEACHER_STEPS
from .common import make_study

IMAGES, STUDENT_STEPS, MIN_SCORE = 80, 1000, 0.5

_all = student_recipe("baselines/faster_rcnn_efficientnet_lite0_aquarium.py", STUDENT_STEPS)
_resize = _all.dataloader.train.mapper.augmentations[0]
_resize.short_edge_length, _resize.max_size = SIDE * 3 // 4, SIDE  # the teacher's; scaled below
_train = _all.dataloader.train.dataset.names
_student = copy.deepcopy(_all)
_student.dataloader.train.dataset.names = L(subset)(dataset=_train, images=IMAGES)
_others = L(subset)(dataset=_train, images=IMAGES, complement=True)

runs = default_runs(_student, lite2(TEACHER_STEPS, SIDE), ["imitation", "tar"], scale=SCALE)
runs["teacher_labels"] = teacher_labels(
    with_downscaled_student(_student, SCALE), _others, MIN_SCORE
)
runs["teacher_labels_and_tar"] = dict(
    teacher_labels(runs["tar"]["config"], _others, MIN_SCORE), teacher="teacher"
)
runs["all_labels"] = dict(config=with_downscaled_student(_all, SCALE))
study = make_study(
    runs,
    title=f"Aquarium with {IMAGES} labelled photographs, and a teacher's labels of the others",
    **aquarium_options(_all),
)
