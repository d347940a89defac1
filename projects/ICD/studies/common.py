"""What the studies here have in common: the runs that ICD is compared with, and its parts."""

import copy

from detectron2.config import LazyCall as L

from d2kd.config import get_config
from d2kd.losses import DistillLosses

from ....configs.common.study import controls, taught


def icd_method(levels=None):
    """``losses`` and ``loss_optimizer`` of ICD as it was set on the shapes; all levels unless some are named."""
    recipe = get_config("projects/ICD/configs/icd_shapes.py")
    recipe.model.losses.icd.levels = levels
    return dict(losses=recipe.model.losses, loss_optimizer=recipe.train.loss_optimizer)


def compared(student, teacher, inherit, levels=None):
    """The runs: teacher, baseline, the baseline given as many seconds, imitation, ICD, and ICD's parts.

    ``inherit`` starts from the teacher's weights and learns alone; ``icd_inherit`` does both. ``icd_uniform``
    compares the same values, but in all cells alike: what ICD gains over it is what the decoder's attention
    earns. ``icd_published`` has the published decoder, which must learn where to look.

    Args:
        student, teacher: whole recipes.
        inherit: prefixes of the weights to inherit.
        levels: that ICD and imitation compare; all by default.
    """
    icd = icd_method(levels)
    uniform, published = copy.deepcopy(icd), copy.deepcopy(icd)
    uniform["losses"].icd.weights = "uniform"
    published["losses"].icd.query_positions = published["losses"].icd.normalize_keys = False
    return dict(
        controls(student, teacher, "icd", levels),
        icd=taught(student, teacher, **icd),
        inherit=taught(student, teacher, inherit, losses=L(DistillLosses)()),
        icd_inherit=taught(student, teacher, inherit, **icd),
        icd_uniform=taught(student, teacher, **uniform),
        icd_published=taught(student, teacher, **published),
    )


def study_of(runs, **options):
    """The study of these runs."""
    compare = ["baseline_equal_time", "imitation", "inherit", "icd_uniform"]
    return dict(baseline="baseline", compare=compare, featured="icd", **options)
