"""The other four shapes learned without the old detector: what ERD is to prevent."""

from d2kd.config import increment

model, dataloader, optimizer, lr_multiplier, train = increment(
    "baselines/gfl_small_shapes.py",
    split="4+4",
    step=2,
    weights="output/gfl_shapes_first_half/model_final.pth",
)
train.output_dir = "output/fine_tuning_shapes"
