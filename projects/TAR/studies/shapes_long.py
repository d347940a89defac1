"""The study of ``shapes.py`` with a long schedule, where the baseline gains little from more iterations.

``baseline_longer`` shows how little, with 1.5 times the iterations. A seed takes several hours on two cores.
"""

import copy

from .shapes import runs, study
from .shapes_ablations import runs as parts

STUDENT_STEPS, TEACHER_STEPS = 5000, 2000

study.title = "TAR on generated shapes, a long schedule"
runs.inherit.pop("optional")
runs.baseline_longer = copy.deepcopy(runs.baseline)
for _method in ("no_gates", "no_decay"):
    runs[_method] = dict(parts[_method], optional=True)
for _method, _run in runs.items():
    _steps = {"teacher": TEACHER_STEPS, "baseline_longer": STUDENT_STEPS * 3 // 2}
    _train = _run.config.train
    _train.max_iter = _steps.get(_method, STUDENT_STEPS)
    _train.eval_period = 1000
    _train.log_period = 50
