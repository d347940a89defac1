"""PKD on COCO: Faster R-CNN R-50 FPN, 1x, from DINOv2's ViT-S/14, a backbone alone. It was not run.

P4 is compared with the last block, whose stride of 14 pixels is nearest. timm downloads the weights.
"""

from detectron2.config import LazyCall as L

from d2kd.config import distill, timm_teacher
from d2kd.losses import DistillLosses, PKDLoss

model, dataloader, optimizer, lr_multiplier, train = distill(
    "baselines/faster_rcnn_R_50_FPN_1x.py",
    teacher=timm_teacher("vit_small_patch14_dinov2.lvd142m"),
    losses=L(DistillLosses)(pkd=L(PKDLoss)()),
)
