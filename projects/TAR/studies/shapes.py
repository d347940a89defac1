"""Does TAR help a small detector on the generated shapes, and more than what its seconds buy otherwise?

A Faster R-CNN with a thin backbone learns alone, alone for as long as TAR takes, beside a teacher by plain feature
imitation, and by TAR. The schedule is cut to fit one seed into twenty minutes on two cores, and short schedules
flatter every method.
"""

import copy

from detectron2.config import LazyCall as L

from d2kd.config import distill, get_config
from d2kd.data import shapes
from d2kd.losses import DistillLosses, ImitationLoss
from d2kd.modeling import Teacher

STUDENT_STEPS, TEACHER_STEPS = 350, 650


def _recipe(width, blocks, steps):
    recipe = get_config("baselines/faster_rcnn_small_shapes.py")
    recipe.model.backbone.bottom_up.width = width
    recipe.model.backbone.bottom_up.blocks = [blocks] * 4
    recipe.train.max_iter = steps
    return recipe


_teacher = _recipe(width=32, blocks=2, steps=TEACHER_STEPS)
_teacher.optimizer.lr = 1e-3
_student = _recipe(width=8, blocks=1, steps=STUDENT_STEPS)


def _taught(inherit=(), **losses):
    """The student's recipe beside the teacher, whose weights the study fills in."""
    teacher = L(Teacher)(detector=_teacher.model, weights="")
    losses = L(DistillLosses)(**losses)
    return distill(_student, teacher=teacher, losses=losses, inherit=inherit)._asdict()


_tar = get_config("projects/TAR/configs/tar_shapes.py").model.losses.tar


def _only(term):
    """TAR with one of its terms."""
    tar = copy.deepcopy(_tar)
    for other in {"feature", "classification", "regression"} - {term}:
        tar[f"{other}_weight"] = 0
    return _taught(tar=tar)


runs = dict(
    teacher=dict(config=_teacher, once=True),
    baseline=dict(config=_student),
    baseline_equal_time=dict(config=_student, steps_like="tar"),
    imitation=dict(config=_taught(imitation=L(ImitationLoss)(weight=0.1)), teacher="teacher"),
    tar=dict(config=_taught(tar=_tar), teacher="teacher"),
    # Asked for by name: --runs tar inherit tar_feature …
    inherit=dict(
        config=_taught(inherit=["backbone.fpn_", "proposal_generator.", "roi_heads."]),
        teacher="teacher",
        optional=True,
    ),
    tar_feature=dict(config=_only("feature"), teacher="teacher", optional=True),
    tar_classification=dict(config=_only("classification"), teacher="teacher", optional=True),
    tar_regression=dict(config=_only("regression"), teacher="teacher", optional=True),
)

study = dict(
    title="TAR on generated shapes: Faster R-CNN, a thin student and its teacher",
    test="shapes_test",
    seeds=[0],
    baseline="baseline",
    compare=["baseline_equal_time", "imitation"],
    featured="tar",
    fast=[
        "train.max_iter=12",
        "train.eval_period=6",
        "train.checkpointer.period=6",
        "train.log_period=2",
        "dataloader.train.total_batch_size=4",
    ],
    fast_setup=L(shapes.register)(train=32, val=16, test=24),
)
