"""ERD on generated shapes, second increment: four more classes, after those of ``gfl_shapes_first_half.py``."""

from detectron2.config import LazyCall as L

from d2kd.config import incremental_recipe
from d2kd.losses import DistillLosses, ERDLoss

model, dataloader, optimizer, lr_multiplier, train = incremental_recipe(
    "baselines/gfl_small_shapes.py",
    split="4+4",
    increment=2,
    weights="output/gfl_shapes_first_half/model_final.pth",
    losses=L(DistillLosses)(erd=L(ERDLoss)()),
)
train.output_dir = "output/erd_shapes"
