"""Faster R-CNN R-50 FPN on COCO, 1x schedule. In the model zoo it is only a yacs YAML."""

from detectron2 import model_zoo

from ..common.models.faster_rcnn_fpn import model

_zoo = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py")
dataloader, optimizer, lr_multiplier, train = (
    _zoo.dataloader,
    _zoo.optimizer,
    _zoo.lr_multiplier,
    _zoo.train,
)

dataloader.train.mapper.use_instance_mask = False
dataloader.train.mapper.recompute_boxes = False
model.backbone.bottom_up.freeze_at = 2
train.device = "auto"
