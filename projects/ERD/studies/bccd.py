"""Incremental detection of blood cells: platelets after red and white cells. D2KD_BCCD is the folder of the data.

No setting is chosen on ``test``, on which only the final weights are evaluated.
"""

from d2kd.config import get_config

from ....configs.common.study import bccd_options
from .common import incremental_runs, make_study

STEPS = 600
BASELINE = "baselines/gfl_small_bccd.py"
SPLIT = [["RBC", "WBC"], ["Platelets"]]

runs = incremental_runs(BASELINE, SPLIT, 2, STEPS)
study = make_study(
    "Blood cells in two increments: GFL, by fine-tuning, LwF and ERD",
    split=SPLIT,
    num_increments=2,
    **bccd_options(get_config(BASELINE)),
)
