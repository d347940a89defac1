"""Measure how much a detector forgets of four classes of generated shapes while it learns four more.

A small GFL learns four classes, then four more from images in which only these are labelled, with fine-tuning, LwF or
ERD. For comparison, the same detector learns all eight at once. The schedule is short, so that one seed takes twenty
minutes on two cores.
"""

from ....configs.common.study import fast_shapes
from .common import incremental_runs, make_study

STEPS = 1400

runs = incremental_runs("baselines/gfl_small_shapes.py", "4+4", 2, STEPS)
study = make_study(
    "Learning generated shapes in two increments: GFL, by fine-tuning, LwF and ERD",
    "shapes_test",
    "4+4",
    2,
    seeds=[0],
    **fast_shapes,
)
