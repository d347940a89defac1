"""The runs shared by TAR's studies: TAR, its terms, and the runs it is compared with."""

import copy

from detectron2.config import LazyCall as L

from d2kd.config import get_config
from d2kd.losses import DistillLosses

from ....configs.common.study import control_runs, distillation_run

_tar = get_config("projects/TAR/configs/tar_shapes.py").model.losses.tar


def tar_losses(term=None, **options):
    """Return TAR with the weights chosen on shapes_val, with only one term if given, or with other options."""
    tar = copy.deepcopy(_tar)
    for other in {"feature", "classification", "regression"} - {term} if term else ():
        tar[f"{other}_weight"] = 0
    tar.update(options)
    return L(DistillLosses)(tar=tar)


def comparison_runs(student, teacher, *, tar=True, inherit=(), scale=1):
    """Return the runs: teacher, baseline, baseline with the time of TAR, imitation, TAR.

    Optional runs (``--runs tar inherit tar_feature …``) are ``inherit`` without distillation, and each term of TAR.

    Args:
        student, teacher: complete recipes.
        tar: False if only features can be compared; the time is then that of imitation.
        inherit: prefixes of the inherited weights.
        scale: factor by which the teacher's images, those of the recipes, are larger than the student's.
    """
    runs = control_runs(student, teacher, match_time_of="tar" if tar else "imitation", scale=scale)
    if tar:
        runs["tar"] = distillation_run(student, teacher, losses=tar_losses(), scale=scale)
    if inherit:
        alone = distillation_run(student, teacher, inherit, scale, losses=L(DistillLosses)())
        runs["inherit"] = dict(alone, optional=True)
    for term in ("feature", "classification", "regression") if tar else ():
        alone = distillation_run(student, teacher, losses=tar_losses(term), scale=scale)
        runs[f"tar_{term}"] = dict(alone, optional=True)
    return runs


def make_study(runs, title, test, **options):
    """Return the study of these runs."""
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
