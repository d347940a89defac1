"""Incremental detection of blood cells, one class at a time: red cells, white cells, platelets."""

from d2kd.config import get_config

from ....configs.common.study import on_blood_cells
from .bccd import BASELINE, STEPS
from .common import in_steps, study_of

SPLIT = [["RBC"], ["WBC"], ["Platelets"]]

runs = in_steps(BASELINE, SPLIT, 3, STEPS, ["fine_tuning", "erd"])
study = study_of(
    "Blood cells in three steps: GFL, by fine-tuning and ERD",
    split=SPLIT,
    number=3,
    **on_blood_cells(get_config(BASELINE)),
)
