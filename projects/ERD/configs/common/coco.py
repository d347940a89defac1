"""A step of COCO, as the recipes here share it: 12 epochs of batches of 16 images, the rate falling after 8 and 11.

Of 40+40 the lengths are known: 97.2 and 54.6 thousand images, as users of the published code have logged. The other
splits are given the same ones, which are not 12 epochs of theirs. What a step's data holds stands in the run's log; 12
epochs of it are ``train.max_iter=$((12 * images / 16))``, and its warm-up ``lr_multiplier.warmup_length=``, 500 by that.
"""

from d2kd.config import increment

FIRST, NEXT = 72890, 40945


def coco_step(split, step, losses=None, method="erd"):
    """The recipe of a step, in ``output/<method>_<split>_step<step>``; of a first one, ``output/gfl_first_<number>``."""

    def folder(step):
        first = f"gfl_first_{split.split('+')[0]}"
        return f"output/{first if step == 1 else f'{method}_{split}_step{step}'}"

    recipe = increment(
        "baselines/gfl_R_50_FPN_1x.py",
        split=split,
        step=step,
        losses=losses,
        weights=f"{folder(step - 1)}/model_final.pth" if step > 1 else "",
    )
    recipe.train.max_iter = FIRST if step == 1 else NEXT
    recipe.train.output_dir = folder(step)
    recipe.lr_multiplier.scheduler.milestones = [8, 11, 12]
    recipe.lr_multiplier.warmup_length = 500 / recipe.train.max_iter
    return recipe
