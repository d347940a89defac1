"""All methods that serve GFL, with the labels of 100 generated images, at their published weights. Nothing is tuned.

The setting is that of ``projects/TAR/studies/few_labels.py``: the teacher has the labels of 800 images. Weights are the
defaults of ``--distill``, which are published ones, in units of the teacher where features are compared; TAR's and
imitation's were chosen by this project. The student alone also gets the time of the slowest method.
"""

from detectron2.config import LazyCall as L

from d2kd.data import shapes, subset

from ....configs.common.study import (
    default_runs,
    fast_shapes,
    student_recipe,
    teacher_recipe,
)

IMAGES, WIDTH, STUDENT_STEPS = 100, 16, 600
TEACHER_WIDTH, TEACHER_BLOCKS, TEACHER_STEPS = 24, [1, 2, 2, 1], 1000
METHODS = (
    "imitation",
    "tar",
    "icd",
    "pkd",
    "bckd",
    "cwd",
    "mgd",
    "crosskd",
    "fgd",
    "reviewkd",
    "ld",
    "dist",
    "pgd",
)
SLOWEST = "mgd"

_baseline = "baselines/gfl_small_shapes.py"
_student = student_recipe(_baseline, STUDENT_STEPS)
_student.model.backbone.bottom_up.width = WIDTH
_student.dataloader.train.dataset.names = L(subset)(dataset="shapes_train", images=IMAGES)
_teacher = teacher_recipe(_baseline, TEACHER_STEPS)
_teacher.model.backbone.bottom_up.update(width=TEACHER_WIDTH, blocks=TEACHER_BLOCKS)

runs = default_runs(_student, _teacher, METHODS)
runs["baseline_equal_time"]["match_time_of"] = SLOWEST
study = dict(
    title=f"Methods for GFL with {IMAGES} labelled images, on generated shapes",
    test="shapes_test",
    baseline="baseline",
    compare=["baseline_equal_time", "imitation"],
    featured="tar",
    seeds=[0, 1, 2, 3],
    **dict(fast_shapes, fast_setup=L(shapes.register_shapes)(train=IMAGES + 20, val=16, test=24)),
)
