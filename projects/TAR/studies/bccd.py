"""Does TAR help a small Faster R-CNN on photographs: blood cells, with real annotations and their faults?

The runs of ``shapes.py``, on data that D2KD_BCCD points to. Every choice is made on ``val``; ``test`` is read once,
by a run's last weights. Its 72 images are few, and a gain is to be believed over several seeds only.
"""

import copy

from .common import compared, study_of, thin, wide

STUDENT_STEPS, TEACHER_STEPS = 600, 1000


def on_blood_cells(baseline, title):
    """The runs and the study of a thin detector and its wider teacher."""
    student, teacher = thin(baseline, STUDENT_STEPS), wide(baseline, TEACHER_STEPS)
    for recipe in (student, teacher):
        recipe.train.eval_period = recipe.train.max_iter // 4
    test = copy.deepcopy(student.dataloader.test.dataset.names)
    test.name, test.split = "bccd_test", "test"
    runs = compared(student, teacher)
    fast = ["train.max_iter=12", "train.eval_period=0", "train.log_period=2"]
    return runs, study_of(runs, title=title, test=test, seeds=[0, 1], fast=fast)


runs, study = on_blood_cells(
    "baselines/faster_rcnn_small_bccd.py",
    "TAR on blood cells: Faster R-CNN, a thin student and its teacher",
)
