"""DIST and imitation on COCO: the recipe beside this one, with the mean squared error of the features added.

As published, that is a mean over all entries of a level, summed over five levels, with a 1x1 convolution on each. In
:class:`ImitationLoss`, which sums over C channels, halves and averages over L levels, this is a weight of 2 L / C.
"""

from detectron2.config import LazyCall as L

from d2kd.losses import ImitationLoss

from .dist_faster_rcnn_R_50_from_cascade_R_50_2x import (  # noqa: F401  (parts of the recipe)
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.losses.imitation = L(ImitationLoss)(
    mask="none", adapter="1x1", normalize=False, weight=2 * 5 / 256
)
