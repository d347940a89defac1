"""The study of ``shapes.py`` in three increments, 4+2+2: each student is the teacher of the next increment."""

from ....configs.common.study import fast_shapes
from .common import incremental_runs, make_study
from .shapes import STEPS

runs = incremental_runs("baselines/gfl_small_shapes.py", "4+2+2", 3, STEPS, ["fine_tuning", "erd"])
study = make_study(
    "Learning generated shapes in three increments: GFL, by fine-tuning and ERD",
    "shapes_test",
    "4+2+2",
    3,
    seeds=[0],
    **fast_shapes,
)
