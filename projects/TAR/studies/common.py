"""What the studies here have in common: a student, what it is compared with, and the controls."""

import copy

from detectron2.config import LazyCall as L

from d2kd.config import distill, get_config
from d2kd.losses import DistillLosses, ImitationLoss
from d2kd.modeling import Teacher


def wide(baseline, steps):
    """A thin detector's recipe as its teacher's: four times the width, twice the blocks."""
    recipe = get_config(baseline)
    recipe.model.backbone.bottom_up.width = 32
    recipe.model.backbone.bottom_up.blocks = [2, 2, 2, 2]
    recipe.train.max_iter = steps
    return recipe


def thin(baseline, steps):
    """A student's recipe."""
    recipe = get_config(baseline)
    recipe.train.max_iter = steps
    return recipe


def compared(student, teacher, *, tar=True, inherit=()):
    """The runs: teacher, baseline, the baseline given as many seconds, imitation, TAR.

    Those asked for by name (``--runs tar inherit tar_feature …``): inherit alone, and TAR's terms one by one.

    Args:
        student, teacher: whole recipes.
        tar: False where only features can be compared; imitation then sets the seconds.
        inherit: prefixes of the weights to inherit.
    """

    def taught(inherit=(), **losses):
        node = L(Teacher)(detector=teacher.model, weights="")  # which the study fills in
        losses = L(DistillLosses)(**losses)
        return distill(student, teacher=node, losses=losses, inherit=inherit)._asdict()

    # The weights of both were chosen on shapes_val.
    loss = get_config("projects/TAR/configs/tar_shapes.py").model.losses.tar

    def only(term):
        tar = copy.deepcopy(loss)
        for other in {"feature", "classification", "regression"} - {term}:
            tar[f"{other}_weight"] = 0
        return taught(tar=tar)

    runs = dict(
        teacher=dict(config=teacher, once=True),
        baseline=dict(config=student),
        baseline_equal_time=dict(config=student, steps_like="tar" if tar else "imitation"),
        imitation=dict(config=taught(imitation=L(ImitationLoss)(weight=0.1)), teacher="teacher"),
    )
    if tar:
        runs["tar"] = dict(config=taught(tar=loss), teacher="teacher")
    if inherit:
        runs["inherit"] = dict(config=taught(inherit=inherit), teacher="teacher", optional=True)
    for term in ("feature", "classification", "regression") if tar else ():
        runs[f"tar_{term}"] = dict(config=only(term), teacher="teacher", optional=True)
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
