"""GFL R-101 FPN on COCO, 2x schedule, short edges of 480 to 800 pixels: a teacher that is not in the model zoo.

The published one (44.7 AP) begins with torchvision's weights, this one with the model zoo's, which are for BGR images.
"""

from detectron2 import model_zoo

from .gfl_R_50_FPN_1x import dataloader, model, optimizer, train  # noqa: F401

_zoo = model_zoo.get_config("common/models/retinanet.py").model
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_2x

model.backbone.bottom_up.stages.depth = 101
model.backbone.bottom_up.stages.stride_in_1x1 = True
model.input_format = "BGR"
model.pixel_mean = _zoo.pixel_mean
model.pixel_std = _zoo.pixel_std
dataloader.train.mapper.image_format = "BGR"
dataloader.train.mapper.augmentations[0].short_edge_length = list(range(480, 801, 32))
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-101.pkl"
train.max_iter = 180000
train.output_dir = "output/gfl_R_101_FPN_2x"
