"""Does TAR help a small Faster R-CNN on photographs: blood cells, with real annotations and their faults?

The runs of ``shapes.py``, on data that D2KD_BCCD points to. Every choice is made on ``val``; ``test`` is read once,
by a run's last weights. Its 72 images are few, and a gain is to be believed over several seeds only.
"""

import copy

from detectron2.config import LazyCall as L

from d2kd.config import distill, get_config
from d2kd.losses import DistillLosses, ImitationLoss
from d2kd.modeling import Teacher

STUDENT_STEPS, TEACHER_STEPS = 600, 1000


def compared(baseline, title):
    """The runs and the study of a thin detector, given as a recipe, and its wider teacher."""
    student, teacher = get_config(baseline), get_config(baseline)
    student.train.max_iter, teacher.train.max_iter = STUDENT_STEPS, TEACHER_STEPS
    for recipe in (student, teacher):
        recipe.train.eval_period = recipe.train.max_iter // 4
    teacher.model.backbone.bottom_up.width = 32
    teacher.model.backbone.bottom_up.blocks = [2, 2, 2, 2]
    teacher.optimizer.lr = 1e-3

    def taught(**losses):
        node = L(Teacher)(detector=teacher.model, weights="")  # which the study fills in
        return distill(student, teacher=node, losses=L(DistillLosses)(**losses))._asdict()

    # The weights that were chosen on the generated shapes.
    tar = get_config("projects/TAR/configs/tar_shapes.py").model.losses.tar
    test = copy.deepcopy(student.dataloader.test.dataset.names)
    test.name, test.split = "bccd_test", "test"
    runs = dict(
        teacher=dict(config=teacher, once=True),
        baseline=dict(config=student),
        baseline_equal_time=dict(config=student, steps_like="tar"),
        imitation=dict(config=taught(imitation=L(ImitationLoss)(weight=0.1)), teacher="teacher"),
        tar=dict(config=taught(tar=tar), teacher="teacher"),
    )
    study = dict(
        title=title,
        test=test,
        seeds=[0, 1],
        baseline="baseline",
        compare=["baseline_equal_time", "imitation"],
        featured="tar",
        fast=["train.max_iter=12", "train.eval_period=0", "train.log_period=2"],
    )
    return runs, study


runs, study = compared(
    "baselines/faster_rcnn_small_bccd.py",
    "TAR on blood cells: Faster R-CNN, a thin student and its teacher",
)
