"""What the studies here have in common: the runs that TAR is compared with, and its parts."""

import copy

from detectron2.config import LazyCall as L

from d2kd.config import get_config
from d2kd.losses import DistillLosses

from ....configs.common.study import controls, taught

_tar = get_config("projects/TAR/configs/tar_shapes.py").model.losses.tar


def tar_losses(term=None, **options):
    """TAR with the weights that were chosen on shapes_val; one of its terms alone, or with other options."""
    tar = copy.deepcopy(_tar)
    for other in {"feature", "classification", "regression"} - {term} if term else ():
        tar[f"{other}_weight"] = 0
    tar.update(options)
    return L(DistillLosses)(tar=tar)


def compared(student, teacher, *, tar=True, inherit=(), scale=1):
    """The runs: teacher, baseline, the baseline given as many seconds, imitation, TAR.

    Those asked for by name (``--runs tar inherit tar_feature …``): inherit alone, and TAR's terms one by one.

    Args:
        student, teacher: whole recipes.
        tar: False where only features can be compared; imitation then sets the seconds.
        inherit: prefixes of the weights to inherit.
        scale: how much larger than the student's the teacher's images, the recipes' own, are.
    """
    runs = controls(student, teacher, steps_like="tar" if tar else "imitation", scale=scale)
    if tar:
        runs["tar"] = taught(student, teacher, losses=tar_losses(), scale=scale)
    if inherit:
        alone = taught(student, teacher, inherit, scale, losses=L(DistillLosses)())
        runs["inherit"] = dict(alone, optional=True)
    for term in ("feature", "classification", "regression") if tar else ():
        alone = taught(student, teacher, losses=tar_losses(term), scale=scale)
        runs[f"tar_{term}"] = dict(alone, optional=True)
    return runs


def study_of(runs, title, test, **options):
    """The study of these runs."""
    last = "tar" if "tar" in runs else "imitation"
    references = ["baseline_equal_time"] + (["imitation"] if last == "tar" else [])
    return dict(
        title=title,
        test=test,
        baseline="baseline",
        compare=references,
        featured=last,
        **options,
    )
