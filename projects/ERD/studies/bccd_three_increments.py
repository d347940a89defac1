"""Incremental detection of blood cells, one class at a time: red cells, white cells, platelets."""

from d2kd.config import get_config

from ....configs.common.study import bccd_options
from .bccd import BASELINE, STEPS
from .common import incremental_runs, make_study

SPLIT = [["RBC"], ["WBC"], ["Platelets"]]

runs = incremental_runs(BASELINE, SPLIT, 3, STEPS, ["fine_tuning", "erd"])
study = make_study(
    "Blood cells in three increments: GFL, by fine-tuning and ERD",
    split=SPLIT,
    num_increments=3,
    **bccd_options(get_config(BASELINE)),
)
