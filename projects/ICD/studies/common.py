"""The runs shared by ICD's studies: ICD, its ablations, and the runs it is compared with."""

import copy

from detectron2.config import LazyCall as L

from d2kd.config import get_config
from d2kd.losses import DistillLosses

from ....configs.common.study import control_runs, distillation_run


def icd_settings(levels=None):
    """Return ``losses`` and ``loss_optimizer`` of ICD with the settings for shapes, on ``levels`` or all by default."""
    recipe = get_config("projects/ICD/configs/icd_shapes.py")
    recipe.model.losses.icd.levels = levels
    return dict(losses=recipe.model.losses, loss_optimizer=recipe.train.loss_optimizer)


def comparison_runs(student, teacher, inherit, levels=None):
    """Return the runs: teacher, baseline, baseline with the time of ICD, imitation, ICD, and ICD's ablations.

    ``inherit`` starts from weights of the teacher and has no distillation loss; ``icd_inherit`` has both.
    ``icd_uniform`` weights all cells equally: the gain of ICD over it is due to the decoder's attention.
    ``icd_published`` has the published decoder, which must learn where to attend.

    Args:
        student, teacher: complete recipes.
        inherit: prefixes of the inherited weights.
        levels: levels that ICD and imitation compare; all by default.
    """
    icd = icd_settings(levels)
    uniform, published = copy.deepcopy(icd), copy.deepcopy(icd)
    uniform["losses"].icd.weights = "uniform"
    published["losses"].icd.query_positions = published["losses"].icd.normalize_keys = False
    return dict(
        control_runs(student, teacher, "icd", levels),
        icd=distillation_run(student, teacher, **icd),
        inherit=distillation_run(student, teacher, inherit, losses=L(DistillLosses)()),
        icd_inherit=distillation_run(student, teacher, inherit, **icd),
        icd_uniform=distillation_run(student, teacher, **uniform),
        icd_published=distillation_run(student, teacher, **published),
    )


def make_study(runs, **options):
    """Return the study of these runs."""
    compare = ["baseline_equal_time", "imitation", "inherit", "icd_uniform"]
    return dict(baseline="baseline", compare=compare, featured="icd", **options)
