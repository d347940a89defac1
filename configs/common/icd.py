"""ICD as published: ``losses``, and ``loss_optimizer`` for the parameters of the losses.

    model, dataloader, optimizer, lr_multiplier, train = distill(…, **method("icd"))

Negatives follow the statistics of the recipe's training data. Recipes change ``model.losses.icd.aux_warmup`` on short
schedules, and ``train.loss_optimizer.optimizer.lr``.
"""

from detectron2.config import LazyCall as L
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import CosineParamScheduler
from torch.optim import AdamW

from d2kd.data import estimate_priors
from d2kd.losses import DistillLosses, ICDLoss

losses = L(DistillLosses)(
    icd=L(ICDLoss)(
        priors=L(estimate_priors)(names="${dataloader.train.dataset.names}"),
        seed="${train.seed}",
    )
)

loss_optimizer = dict(
    optimizer=L(AdamW)(params=L(get_default_optimizer_params)(), lr=1e-4, weight_decay=1e-4),
    lr_multiplier=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
    clip_gradients=dict(enabled=True, clip_type="full_model", clip_value=0.01),
)
