"""TAR for one-stage detectors on COCO: RetinaNet R-50 FPN, 1x, from the zoo's R-101 FPN."""

from d2kd.config import distill, get_config

model, dataloader, optimizer, lr_multiplier, train = distill(
    "COCO-Detection/retinanet_R_50_FPN_1x.py",
    teacher=(
        "COCO-Detection/retinanet_R_101_FPN_3x.yaml",
        "detectron2://COCO-Detection/retinanet_R_101_FPN_3x/190397697/model_final_971ab9.pkl",
    ),
    losses=get_config("common/tar.py").losses,
)
