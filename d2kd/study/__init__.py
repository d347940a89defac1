"""A study: several trainings over several seeds, and one table of their results.

A study file is a LazyConfig with two nodes: ``study``, the fields of :class:`Study`, and ``runs``::

    study = dict(title="Does it help?", test="my_test", baseline="baseline")
    runs = dict(
        teacher=dict(config=…, shared_across_seeds=True),              # one run shared by all seeds
        baseline=dict(config=…),                        # one run per seed
        tar=dict(config=…, teacher="teacher"),          # sets model.teacher.weights
        longer=dict(config=…, init_from="baseline"),  # sets train.init_checkpoint
        equal_time=dict(config=…, match_time_of="tar"),    # sets train.max_iter, to match the training time
        ablation=dict(config=…, optional=True),         # runs only if given by name
    )

A run may have ``labels``: further training images that another run's final detector labels before the training. The
file is written once, into that run's folder, and used again when the study is resumed::

    pseudo=dict(config=…, labels=dict(detector="teacher", dataset=<name or node>, min_score=0.5)),

For class-incremental learning, see :mod:`d2kd.data.incremental`, there are two more keys. A run with an ``increment`` is
evaluated on the classes learned so far; the run it depends on has learned those of the increments before::

    study = dict(…, increments="4+4", upper_bound="everything")
    runs = dict(
        first=dict(config=…, increment=1),
        erd=dict(config=…, increment=2, teacher="first"),
        everything=dict(config=…),                      # all classes at once
    )

``config`` is a complete recipe: model, dataloader, optimizer, lr_multiplier, train. A run is finished if its folder has
weights and a row made from the same recipe and the same initial or teacher weights. An unfinished run is resumed. A
folder made from another recipe is renamed, not deleted. Changes of the *code* are not detected; use another output
folder then.

The figures are those of the final weights on the test split, which is evaluated once. ``seconds`` is the time in
training steps, including data loading, without evaluation and checkpoints. It is saved with the weights, so steps lost
in an interruption do not count. Since runs in parallel slow each other down, an equal-time run does not use it: after
the teacher is trained, and while no run is, steps of the distilled and of the plain recipe are timed alternately. The
ratio is saved in the study's ``step_cost.json`` and reused when the study is resumed.

:class:`ParallelRunner` trains a run with the training command, on the ``config.yaml`` that the study writes into the run's
folder. :class:`SequentialRunner` trains in this process, for ``--fast`` and tests.
"""

from .plan import Run, Study, build_study, load_and_plan, load_study, prepare_recipe
from .results import write_results, write_tables_and_plots
from .run import TrainingResult, train
from .schedule import ParallelRunner, SequentialRunner, run_study

__all__ = [
    "ParallelRunner",
    "Run",
    "SequentialRunner",
    "Study",
    "TrainingResult",
    "build_study",
    "load_and_plan",
    "load_study",
    "prepare_recipe",
    "run_study",
    "train",
    "write_results",
    "write_tables_and_plots",
]
