"""Blood cells one class at a time: red cells, white cells, platelets."""

from .bccd import BASELINE, FAST, STEPS, test_of
from .common import in_steps, study_of

SPLIT = [["RBC"], ["WBC"], ["Platelets"]]

runs = in_steps(BASELINE, SPLIT, 3, STEPS, ["fine_tuning", "erd"])
study = study_of(
    "Blood cells in three steps: GFL, by fine-tuning and ERD",
    test_of(BASELINE),
    SPLIT,
    3,
    seeds=[0, 1],
    fast=FAST,
)
