"""DKD on COCO: Faster R-CNN MobileNetV3-Large FPN, from the zoo's R-50 FPN. Published with MobileNetV2, see README.md."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from d2kd.config import distill
from d2kd.losses import DistillLosses, DKDLoss

model, dataloader, optimizer, lr_multiplier, train = distill(
    "baselines/faster_rcnn_mobilenet_v3_FPN_1x.py",
    teacher=(
        "COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml",
        "detectron2://COCO-Detection/faster_rcnn_R_50_FPN_3x/137849458/model_final_280758.pkl",
    ),
    losses=L(DistillLosses)(
        dkd=L(DKDLoss)(target_weight=1.0, non_target_weight=0.25, temperature=1.0)
    ),
)

# As published: 8 images a step, half the rate, twice the steps.
dataloader.train.total_batch_size, optimizer.lr = 8, 0.01
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_2x
train.max_iter = 180000
