"""GFL R-50 FPN on COCO, 1x schedule, as published (40.2 AP): one scale, all parameters with weight decay."""

from detectron2 import model_zoo

from ..common.models.gfl import model  # noqa: F401  (part of the recipe)

_zoo = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.py")
dataloader, optimizer, lr_multiplier, train = (
    _zoo.dataloader,
    _zoo.optimizer,
    _zoo.lr_multiplier,
    _zoo.train,
)

dataloader.train.mapper.image_format = "RGB"
dataloader.train.mapper.augmentations[0].short_edge_length = 800
optimizer.params.weight_decay_norm = None  # the same as for all other parameters
lr_multiplier.warmup_length = 500 / train.max_iter
train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
train.device = "auto"
