"""The recipe of a COCO increment: 12 epochs with 16 images per batch, and learning rate drops after epochs 8 and 11.

For 40+40, the numbers of images are 97.2 and 54.6 thousand, from logs of the published code. Other splits use the same
numbers of iterations, which are not 12 epochs of them. A run logs the number of its images; for 12 epochs, set
``train.max_iter=$((12 * images / 16))``, and ``lr_multiplier.warmup_length`` to 500 / max_iter.
"""

from d2kd.config import incremental_recipe

FIRST, NEXT = 72890, 40945


def coco_increment(split, increment, losses=None, method="erd"):
    """Return the recipe of an increment, for ``output/<method>_<split>_increment<increment>`` or ``output/gfl_first_<number>``."""

    def folder(increment):
        first = f"gfl_first_{split.split('+')[0]}"
        return f"output/{first if increment == 1 else f'{method}_{split}_increment{increment}'}"

    recipe = incremental_recipe(
        "baselines/gfl_R_50_FPN_1x.py",
        split=split,
        increment=increment,
        losses=losses,
        weights=f"{folder(increment - 1)}/model_final.pth" if increment > 1 else "",
    )
    recipe.train.max_iter = FIRST if increment == 1 else NEXT
    recipe.train.output_dir = folder(increment)
    recipe.lr_multiplier.scheduler.milestones = [8, 11, 12]
    recipe.lr_multiplier.warmup_length = 500 / recipe.train.max_iter
    return recipe
