"""Learning without Forgetting, as ported to detection by d2kd, on generated shapes, second increment of 4+4."""

from detectron2.config import LazyCall as L

from d2kd.config import incremental_recipe
from d2kd.losses import DistillLosses, LwFLoss

model, dataloader, optimizer, lr_multiplier, train = incremental_recipe(
    "baselines/gfl_small_shapes.py",
    split="4+4",
    increment=2,
    weights="output/gfl_shapes_first_half/model_final.pth",
    losses=L(DistillLosses)(lwf=L(LwFLoss)()),
)
train.output_dir = "output/lwf_shapes"
