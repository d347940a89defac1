"""A small GFL on the first four classes of generated shapes: increment 1 of 4+4.

d2kd train --config-file projects/ERD/configs/gfl_shapes_first_half.py
"""

from d2kd.config import incremental_recipe

model, dataloader, optimizer, lr_multiplier, train = incremental_recipe(
    "baselines/gfl_small_shapes.py", split="4+4", increment=1
)
train.output_dir = "output/gfl_shapes_first_half"
