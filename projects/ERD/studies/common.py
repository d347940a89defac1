"""The runs shared by ERD's studies: a detector that learns classes in increments by several methods, or all at once."""

from detectron2.config import LazyCall as L

from d2kd.config import get_config, incremental_recipe
from d2kd.losses import DistillLosses, ERDLoss, LwFLoss

METHODS = {
    "fine_tuning": lambda: None,
    "lwf": lambda: L(DistillLosses)(lwf=L(LwFLoss)()),
    "erd": lambda: L(DistillLosses)(erd=L(ERDLoss)()),
}
# Ablations run only if they are selected by name.
ABLATIONS = {
    "erd_with_stride": lambda: L(DistillLosses)(erd=L(ERDLoss)(decode_with_stride=True)),
}


def incremental_runs(baseline, split, number, steps, methods=(*METHODS, *ABLATIONS)):
    """Return the runs: the first increment, the other increments with each method, and all classes at once.

    "everything" is trained as long as one increment; "everything_longer", an optional run, as long as all increments.

    Args:
        baseline: name of the recipe that trains all classes.
        split, number: the split, see :func:`d2kd.data.split_classes`, and its number of increments.
        steps: iterations of each run.
        methods: names in ``METHODS`` and ``ABLATIONS``.
    """

    def recipe(step=None, losses=None, steps=steps):
        config = get_config(baseline)
        if step is not None:
            config = incremental_recipe(config, split=split, step=step, losses=losses)._asdict()
        config["train"]["max_iter"] = steps
        config["train"]["eval_period"] = steps // 2
        return config

    runs = dict(first=dict(config=recipe(1), step=1))
    for method in methods:
        before = "first"
        for step in range(2, number + 1):
            name = method if number == 2 else f"{method}_step{step}"
            config = recipe(step, (METHODS | ABLATIONS)[method]())
            optional = method in ABLATIONS
            runs[name] = dict(config=config, step=step, teacher=before, optional=optional)
            before = name
    runs["everything"] = dict(config=recipe())
    runs["everything_longer"] = dict(config=recipe(steps=number * steps), optional=True)
    return runs


def make_study(title, test, split, number, **options):
    """Return the study of these runs, with fine-tuning as the baseline."""
    last = "" if number == 2 else f"_step{number}"
    return dict(
        title=title,
        test=test,
        steps=split,
        baseline=f"fine_tuning{last}",
        featured=f"erd{last}",
        upper_bound="everything",
        **options,
    )
