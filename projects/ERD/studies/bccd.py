"""Blood cells in two steps: platelets after red and white cells. D2KD_BCCD names the folder of the data.

Every choice is made on ``val``; ``test`` is read once, by a run's last weights.
"""

import copy

from d2kd.config import get_config

from .common import in_steps, study_of

STEPS = 600
BASELINE = "baselines/gfl_small_bccd.py"
SPLIT = [["RBC", "WBC"], ["Platelets"]]


def test_of(baseline):
    """The test split, registered when the study is loaded."""
    test = copy.deepcopy(get_config(baseline).dataloader.test.dataset.names)
    test.name, test.split = "bccd_test", "test"
    return test


FAST = ["train.max_iter=12", "train.eval_period=0", "train.log_period=2"]

runs = in_steps(BASELINE, SPLIT, 2, STEPS)
study = study_of(
    "Blood cells in two steps: GFL, by fine-tuning, LwF and ERD",
    test_of(BASELINE),
    SPLIT,
    2,
    seeds=[0, 1],
    fast=FAST,
)
