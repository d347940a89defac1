"""What the studies here have in common: a detector that learns in steps, by several methods, and all at once."""

from detectron2.config import LazyCall as L

from d2kd.config import get_config, increment
from d2kd.losses import DistillLosses, ERDLoss, LwFLoss

METHODS = {
    "fine_tuning": lambda: None,
    "lwf": lambda: L(DistillLosses)(lwf=L(LwFLoss)()),
    "erd": lambda: L(DistillLosses)(erd=L(ERDLoss)()),
}
# Ablations run where they are named.
ABLATIONS = {
    "erd_with_stride": lambda: L(DistillLosses)(erd=L(ERDLoss)(decode_with_stride=True)),
}


def in_steps(baseline, split, number, steps, methods=(*METHODS, *ABLATIONS)):
    """The runs: the first step, each method's other steps, everything at once.

    "everything" takes as long as a step; "everything_longer", which runs where it is named, as long as all of them.

    Args:
        baseline: the recipe of all classes, by name.
        split, number: see :func:`d2kd.data.split_classes`, and how many steps that are.
        steps: of training, of each run.
        methods: names of ``METHODS`` and ``ABLATIONS``.
    """

    def recipe(step=None, losses=None, steps=steps):
        config = get_config(baseline)
        if step is not None:
            config = increment(config, split=split, step=step, losses=losses)._asdict()
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


def study_of(title, test, split, number, **options):
    """The study of these runs, that compares with fine-tuning."""
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
