"""A small Faster R-CNN on the generated shapes: the student of the studies, without a teacher.

Studies change ``model.backbone.bottom_up.width`` and ``.blocks``, and ``train.max_iter``.
"""

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import CosineParamScheduler
from torch.optim import AdamW

from ..common.data.shapes import dataloader  # noqa: F401  (part of the recipe)
from ..common.models.faster_rcnn_small import model
from ..common.train import train

model.backbone.bottom_up.width = 8
model.backbone.bottom_up.blocks = [1, 1, 1, 1]

# AdamW is better than SGD on such a short schedule.
optimizer = L(AdamW)(
    params=L(get_default_optimizer_params)(weight_decay_norm=0.0),
    lr=2e-3,
    weight_decay=0.05,
)

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
    warmup_factor=0.01,
    warmup_length=0.1,
)

train.max_iter = 550
train.eval_period = 275
train.best_checkpoint = ""
train.log_period = 10
train.checkpointer = dict(period=100, max_to_keep=1)
train.clip_gradients = dict(train.clip_gradients, enabled=True, clip_value=10.0)
