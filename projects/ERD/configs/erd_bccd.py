"""ERD on blood cells, second increment: platelets, after red and white cells."""

from detectron2.config import LazyCall as L

from d2kd.config import incremental_recipe
from d2kd.losses import DistillLosses, ERDLoss

model, dataloader, optimizer, lr_multiplier, train = incremental_recipe(
    "baselines/gfl_small_bccd.py",
    split=[["RBC", "WBC"], ["Platelets"]],
    increment=2,
    weights="output/gfl_bccd_first/model_final.pth",
    losses=L(DistillLosses)(erd=L(ERDLoss)()),
)
train.output_dir = "output/erd_bccd"
