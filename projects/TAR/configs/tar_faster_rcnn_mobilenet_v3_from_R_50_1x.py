"""TAR on COCO: Faster R-CNN MobileNetV3-Large FPN, 1x, from the zoo's R-50 FPN."""

from d2kd.config import distill, get_config

model, dataloader, optimizer, lr_multiplier, train = distill(
    "baselines/faster_rcnn_mobilenet_v3_FPN_1x.py",
    teacher=(
        "COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml",
        "detectron2://COCO-Detection/faster_rcnn_R_50_FPN_3x/137849458/model_final_280758.pkl",
    ),
    losses=get_config("common/tar.py").losses,
)
