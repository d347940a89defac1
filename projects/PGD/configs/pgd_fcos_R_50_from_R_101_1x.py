"""PGD on COCO: FCOS R-50 FPN, 1x, from R-101 FPN. Published AP: 38.2 without and 42.5 with PGD.

The model zoo has no FCOS R-101: ``baselines/fcos_R_101_FPN_3x.py`` trains one. With ``masks="all"``, weights depend on
the images per process: train with 8 GPUs of four.
"""

from detectron2.config import LazyCall as L

from d2kd.config import distill
from d2kd.losses import DistillLosses, PGDLoss

model, dataloader, optimizer, lr_multiplier, train = distill(
    "COCO-Detection/fcos_R_50_FPN_1x.py",
    teacher=("baselines/fcos_R_101_FPN_3x.py", "output/fcos_R_101_FPN_3x/model_final.pth"),
    inherit=["backbone.fpn_", "backbone.top_block.", "head."],
    losses=L(DistillLosses)(
        pgd=L(PGDLoss)(
            topk=30,
            foreground_weight=0.04,
            background_weight=0.02,
            regression_weight=0.064,
            attention_weight=8e-4,
            temperature=0.8,
            masks="all",
            normalize=False,
            across_processes=False,
            seed="${train.seed}",
        )
    ),
)

dataloader.train.total_batch_size = 32
optimizer.lr = 0.02
optimizer.params.weight_decay_norm = None  # the default decay, because the head's norms are trained
train.max_iter = 45000
train.clip_gradients = dict(enabled=True, clip_type="full_model", clip_value=35.0)
