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


def incremental_runs(baseline, split, num_increments, max_iter, methods=(*METHODS, *ABLATIONS)):
    """Return the runs: the first increment, the other increments with each method, and all classes at once.

    "everything" is trained as long as one increment; "everything_longer", an optional run, as long as all increments.

    Args:
        baseline: name of the recipe that trains all classes.
        split, num_increments: the split, see :func:`d2kd.data.split_classes`, and its number of increments.
        max_iter: iterations of each run.
        methods: names in ``METHODS`` and ``ABLATIONS``.
    """

    def recipe(increment=None, losses=None, max_iter=max_iter):
        config = get_config(baseline)
        if increment is not None:
            config = incremental_recipe(
                config, split=split, increment=increment, losses=losses
            )._asdict()
        config["train"]["max_iter"] = max_iter
        config["train"]["eval_period"] = max_iter // 2
        return config

    runs = dict(first=dict(config=recipe(1), increment=1))
    for method in methods:
        before = "first"
        for increment in range(2, num_increments + 1):
            name = method if num_increments == 2 else f"{method}_increment{increment}"
            config = recipe(increment, (METHODS | ABLATIONS)[method]())
            optional = method in ABLATIONS
            runs[name] = dict(config=config, increment=increment, teacher=before, optional=optional)
            before = name
    runs["everything"] = dict(config=recipe())
    runs["everything_longer"] = dict(
        config=recipe(max_iter=num_increments * max_iter), optional=True
    )
    return runs


def make_study(title, test, split, num_increments, **options):
    """Return the study of these runs, with fine-tuning as the baseline."""
    last = "" if num_increments == 2 else f"_increment{num_increments}"
    return dict(
        title=title,
        test=test,
        increments=split,
        baseline=f"fine_tuning{last}",
        featured=f"erd{last}",
        upper_bound="everything",
        **options,
    )
