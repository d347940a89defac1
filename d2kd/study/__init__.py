"""A study: runs over seeds, each trained once, and one table of what they reached.

A study file is a LazyConfig with two nodes: ``study``, the fields of :class:`Study`, and ``runs``::

    study = dict(title="Does it help?", test="my_test", baseline="baseline")
    runs = dict(
        teacher=dict(config=…, once=True),              # one run for all seeds
        baseline=dict(config=…),                        # one per seed
        tar=dict(config=…, teacher="teacher"),          # model.teacher.weights: that run's
        longer=dict(config=…, starts_from="baseline"),  # train.init_checkpoint: that run's
        equal_time=dict(config=…, steps_like="tar"),    # as many steps as cost what that run costs
        ablation=dict(config=…, optional=True),         # only when asked for by name
    )

Classes learned in steps, see :mod:`d2kd.data.incremental`, are two words more. A run that names its step is measured on
the classes learned by then, and the run it starts from has learned those before::

    study = dict(…, steps="4+4", upper_bound="everything")
    runs = dict(
        first=dict(config=…, step=1),
        erd=dict(config=…, step=2, teacher="first"),
        everything=dict(config=…),                      # all classes at once
    )

``config`` is a whole recipe: model, dataloader, optimizer, lr_multiplier, train. A run is finished when its folder
holds weights and a row that were made from the same recipe and the same sources. Anything else is continued, and a
folder made from another recipe is moved aside, not deleted. A change of *code* is not seen: it wants another output
folder.

The figures are those of the last weights on the test split, looked at once. ``seconds`` is the time inside training
steps, loading included, evaluation and checkpoints not. It is saved with the weights, so steps that an interruption
threw away do not count. Runs that are trained side by side share the machine, and their seconds show it. So the steps of
an equal-time run do not go by them: once the teacher is trained, and while nothing else is, steps of the distilled
recipe and of the plain one are timed in turn. The ratio of their costs is kept in the study's ``step_cost.json``, and
used again when the study is continued.

A run is trained by the training command, on the ``config.yaml`` that the study writes into the run's folder:
:class:`Commands`. :class:`OneByOne` trains in this process, for ``--fast`` and tests.
"""

from .plan import Run, Study, load, parse, planned, prepare
from .results import show_results, write_results
from .run import Measured, train
from .schedule import Commands, OneByOne, run_study

__all__ = [
    "Commands",
    "Measured",
    "OneByOne",
    "Run",
    "Study",
    "load",
    "parse",
    "planned",
    "prepare",
    "run_study",
    "show_results",
    "train",
    "write_results",
]
