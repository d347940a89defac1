"""TAR on COCO: Mask R-CNN R-50 FPN, 1x, from the zoo's R-101 FPN. The mask term is this project's, not the paper's."""

from d2kd.config import distill, get_config

model, dataloader, optimizer, lr_multiplier, train = distill(
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py",
    teacher=(
        "COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x.yaml",
        "detectron2://COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x/138205316/"
        "model_final_a3ec72.pkl",
    ),
    losses=get_config("common/tar.py").losses,
)
