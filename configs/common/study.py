"""What studies have in common: a thin student, its wider teacher, and the runs that any method is set beside."""

import copy

from detectron2.config import LazyCall as L

from d2kd.config import distill, get_config, reduced
from d2kd.data import shapes
from d2kd.losses import DistillLosses, ImitationLoss
from d2kd.modeling import Teacher

# Of a study on the generated shapes, what --fast changes.
fast_shapes = dict(
    fast=[
        "train.max_iter=12",
        "train.eval_period=6",
        "train.checkpointer.period=6",
        "train.log_period=2",
        "dataloader.train.total_batch_size=4",
    ],
    fast_setup=L(shapes.register)(train=32, val=16, test=24),
)


def wide(baseline, steps, lr=None):
    """A thin detector's recipe as its teacher's: four times the width, twice the blocks; its rate, too, unless given."""
    recipe = get_config(baseline)
    recipe.optimizer.lr = lr or recipe.optimizer.lr
    recipe.model.backbone.bottom_up.width = 32
    recipe.model.backbone.bottom_up.blocks = [2, 2, 2, 2]
    recipe.train.max_iter, recipe.train.eval_period = steps, steps // 2
    return recipe


def thin(baseline, steps):
    """A student's recipe."""
    recipe = get_config(baseline)
    recipe.train.max_iter, recipe.train.eval_period = steps, steps // 2
    return recipe


def on_blood_cells(recipe):
    """The options of a study on the blood cells: their test split, registered when the study is loaded."""
    test = copy.deepcopy(recipe.dataloader.test.dataset.names)
    test.name, test.split = "bccd_test", "test"
    fast = ["train.max_iter=12", "train.eval_period=0", "train.log_period=2"]
    return dict(test=test, seeds=[0, 1], fast=fast)


def blood_cells(baseline, student_steps, teacher_steps):
    """A student's recipe, its teacher's, and the study's options, on data that D2KD_BCCD points to."""
    student, teacher = thin(baseline, student_steps), wide(baseline, teacher_steps)
    for recipe in (student, teacher):
        recipe.train.eval_period = recipe.train.max_iter // 4
    return student, teacher, on_blood_cells(student)


def taught(student, teacher, inherit=(), scale=1, **method):
    """The run of a student beside the teacher that the study trains first.

    Args:
        student, teacher: whole recipes.
        inherit: prefixes of the weights to inherit.
        scale: how much larger than the student's the teacher's images are.
        method: ``losses`` and ``loss_optimizer`` of :func:`d2kd.config.distill`.
    """
    node = L(Teacher)(detector=teacher.model, weights="")  # which the study fills in
    recipe = distill(student, teacher=node, inherit=inherit, scale=scale, **method)
    return dict(config=recipe._asdict(), teacher="teacher")


def controls(student, teacher, steps_like, levels=None, scale=1):
    """The runs: teacher, baseline, the baseline given as many seconds as ``steps_like`` takes, imitation.

    Args:
        student, teacher: whole recipes.
        steps_like: name of a run.
        levels: that imitation compares; all by default.
        scale: how much larger than the student's the teacher's images, the recipes' own, are.
    """
    alone = reduced(student, scale) if scale > 1 else student
    # The weight was chosen on shapes_val.
    losses = L(DistillLosses)(imitation=L(ImitationLoss)(levels=levels, weight=0.1))
    return dict(
        teacher=dict(config=teacher, once=True),
        baseline=dict(config=alone),
        baseline_equal_time=dict(config=alone, steps_like=steps_like),
        imitation=taught(student, teacher, losses=losses, scale=scale),
    )
