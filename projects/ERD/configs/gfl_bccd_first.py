"""A small GFL on red and white blood cells: the first increment, before platelets."""

from d2kd.config import incremental_recipe

model, dataloader, optimizer, lr_multiplier, train = incremental_recipe(
    "baselines/gfl_small_bccd.py", split=[["RBC", "WBC"], ["Platelets"]], increment=1
)
train.output_dir = "output/gfl_bccd_first"
