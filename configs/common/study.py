"""Common parts of studies: a small student, its wider teacher, and the runs that every method is compared with."""

import copy

from detectron2.config import LazyCall as L

from d2kd.config import distill, get_config, method, with_downscaled_student
from d2kd.data import shapes
from d2kd.losses import DistillLosses, ImitationLoss
from d2kd.modeling import Teacher

# The changes of --fast in a study on the generated shapes.
fast_shapes = dict(
    fast=[
        "train.max_iter=12",
        "train.eval_period=6",
        "train.checkpointer.period=6",
        "train.log_period=2",
        "dataloader.train.total_batch_size=4",
    ],
    fast_setup=L(shapes.register_shapes)(train=32, val=16, test=24),
)


def teacher_recipe(baseline, steps, lr=None):
    """Return the recipe of a teacher with four times the width and twice the blocks of ``baseline``."""
    recipe = get_config(baseline)
    recipe.optimizer.lr = lr or recipe.optimizer.lr
    recipe.model.backbone.bottom_up.width = 32
    recipe.model.backbone.bottom_up.blocks = [2, 2, 2, 2]
    recipe.train.max_iter, recipe.train.eval_period = steps, steps // 2
    return recipe


def student_recipe(baseline, steps):
    """Return the recipe of a student."""
    recipe = get_config(baseline)
    recipe.train.max_iter, recipe.train.eval_period = steps, steps // 2
    return recipe


def bccd_options(recipe):
    """Return the options of a study on BCCD. Its test split is registered when the study is loaded."""
    test = copy.deepcopy(recipe.dataloader.test.dataset.names)
    test.name, test.split = "bccd_test", "test"
    fast = ["train.max_iter=12", "train.eval_period=0", "train.log_period=2"]
    return dict(test=test, seeds=[0, 1], fast=fast)


def bccd_recipes(baseline, student_steps, teacher_steps):
    """Return a student's recipe, its teacher's recipe and the study's options, on BCCD at the path D2KD_BCCD."""
    student, teacher = (
        student_recipe(baseline, student_steps),
        teacher_recipe(baseline, teacher_steps),
    )
    for recipe in (student, teacher):
        recipe.train.eval_period = recipe.train.max_iter // 4
    return student, teacher, bccd_options(student)


def aquarium_options(recipe):
    """Return the options of a study on Aquarium. Its test split is registered when the study is loaded."""
    test = copy.deepcopy(recipe.dataloader.test.dataset.names)
    test.name, test.json_file = "aquarium_test", "$D2KD_AQUARIUM/test.json"
    fast = ["train.max_iter=12", "train.eval_period=0", "train.log_period=2"]
    return dict(test=test, seeds=[0, 1], fast=fast)


def distillation_run(student, teacher, inherit=(), scale=1, **settings):
    """Return the run of a student with the teacher that the study trains first.

    Args:
        student, teacher: recipes.
        inherit: prefixes of the weights to inherit.
        scale: size of the teacher's images relative to the student's.
        settings: ``losses`` and ``loss_optimizer`` of :func:`d2kd.config.distill`.
    """
    node = L(Teacher)(detector=teacher.model, weights="")  # set by the study
    recipe = distill(student, teacher=node, inherit=inherit, scale=scale, **settings)
    return dict(config=recipe._asdict(), teacher="teacher")


def teacher_labels(student, dataset, min_score):
    """Return the run of a student without a teacher, but also on images that the study's teacher labels.

    Args:
        student: recipe.
        dataset: the images: name of a data set, or a node that registers it.
        min_score: minimum score of the detections that become labels.
    """
    labels = dict(detector="teacher", dataset=dataset, min_score=min_score)
    return dict(config=student, labels=labels)


def control_runs(student, teacher, match_time_of, levels=None, scale=1):
    """Return the runs: teacher, baseline, baseline with the training time of run ``match_time_of``, imitation.

    Args:
        student, teacher: recipes.
        match_time_of: name of a run.
        levels: levels compared by imitation. Default: all.
        scale: size of the teacher's images, which is that of the recipes, relative to the student's.
    """
    alone = with_downscaled_student(student, scale) if scale > 1 else student
    # This weight was chosen on shapes_val.
    losses = L(DistillLosses)(
        imitation=L(ImitationLoss)(levels=levels, normalize=False, weight=0.1)
    )
    return dict(
        teacher=dict(config=teacher, shared_across_seeds=True),
        baseline=dict(config=alone),
        baseline_equal_time=dict(config=alone, match_time_of=match_time_of),
        imitation=distillation_run(student, teacher, losses=losses, scale=scale),
    )


def default_runs(student, teacher, methods=("imitation", "tar", "icd"), scale=1):
    """Return the runs: teacher, baseline, baseline with the training time of TAR, and each method with its defaults.

    For the other arguments, see :func:`control_runs`. The defaults are those of ``--distill``.
    """
    runs = control_runs(student, teacher, match_time_of="tar", scale=scale)
    for name in methods:
        runs[name] = distillation_run(student, teacher, scale=scale, **method(name))
    return runs
