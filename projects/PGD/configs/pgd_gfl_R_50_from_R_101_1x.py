"""PGD on COCO: GFL R-50 FPN, 1x, from R-101 FPN. Published AP: 40.2 without and 43.8 with PGD.

``baselines/gfl_R_101_FPN_2x.py`` trains the teacher; published is one of 3x. With ``masks="all"``, weights depend on the
images per process: train with 8 GPUs of four.
"""

from detectron2.config import LazyCall as L

from d2kd.config import distill
from d2kd.losses import DistillLosses, PGDLoss

model, dataloader, optimizer, lr_multiplier, train = distill(
    "baselines/gfl_R_50_FPN_1x.py",
    teacher=("baselines/gfl_R_101_FPN_2x.py", "output/gfl_R_101_FPN_2x/model_final.pth"),
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
train.max_iter = 45000
lr_multiplier.warmup_length = 500 / train.max_iter
train.clip_gradients = dict(enabled=True, clip_type="full_model", clip_value=35.0)
