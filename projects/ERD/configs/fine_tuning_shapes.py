"""Fine-tuning on the last four classes of generated shapes, without a teacher: the baseline of ERD."""

from d2kd.config import incremental_recipe

model, dataloader, optimizer, lr_multiplier, train = incremental_recipe(
    "baselines/gfl_small_shapes.py",
    split="4+4",
    increment=2,
    weights="output/gfl_shapes_first_half/model_final.pth",
)
train.output_dir = "output/fine_tuning_shapes"
