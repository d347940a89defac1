"""TAR on COCO: Faster R-CNN MobileNetV3-Large FPN, 1x, from the zoo's R-50 FPN."""

from detectron2.config import LazyCall as L

from d2kd.config import distill
from d2kd.losses import DistillLosses, TARLoss

model, dataloader, optimizer, lr_multiplier, train = distill(
    "baselines/faster_rcnn_mobilenet_v3_FPN_1x.py",
    teacher=(
        "COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml",
        "detectron2://COCO-Detection/faster_rcnn_R_50_FPN_3x/137849458/model_final_280758.pkl",
    ),
    losses=L(DistillLosses)(tar=L(TARLoss)()),
)
