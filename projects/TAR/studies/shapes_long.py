"""The study of ``shapes.py`` at ten times its steps, where the baseline has little left to gain by more of them.

Some hours on two cores for each seed.
"""

from .shapes import runs, study

STUDENT_STEPS, TEACHER_STEPS = 4000, 3000

study.title = "TAR on generated shapes, a long schedule"
runs.inherit.pop("optional")
for _method, _run in runs.items():
    _train = _run.config.train
    _train.max_iter = TEACHER_STEPS if _method == "teacher" else STUDENT_STEPS
    _train.eval_period = 1000
    _train.log_period = 50
