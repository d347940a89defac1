"""Incremental detection of blood cells: platelets after red and white cells. D2KD_BCCD is the folder of the data.

No setting is chosen on ``test``, on which only the final weights are evaluated.
"""

from d2kd.config import get_config

from ....configs.common.study import on_blood_cells
from .common import in_steps, study_of

STEPS = 600
BASELINE = "baselines/gfl_small_bccd.py"
SPLIT = [["RBC", "WBC"], ["Platelets"]]

runs = in_steps(BASELINE, SPLIT, 2, STEPS)
study = study_of(
    "Blood cells in two steps: GFL, by fine-tuning, LwF and ERD",
    split=SPLIT,
    number=2,
    **on_blood_cells(get_config(BASELINE)),
)
