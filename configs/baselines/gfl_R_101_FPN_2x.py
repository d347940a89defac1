"""GFL R-101 FPN on COCO, 2x schedule with shorter sides from 480 to 800: a teacher of GFL R-50. Published: 44.7 or 44.9 AP.

Its backbone starts from MSRA's weights, as all R-101 here; published are torchvision's.
"""

from detectron2 import model_zoo

from .gfl_R_50_FPN_1x import dataloader, model, optimizer, train  # noqa: F401

lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_2x

model.backbone.bottom_up.stages.depth = 101
# MSRA's weights have other images, and the stride in the 1x1 convolution.
model.backbone.bottom_up.stages.stride_in_1x1 = True
model.input_format = dataloader.train.mapper.image_format = "BGR"
model.pixel_mean, model.pixel_std = [103.53, 116.28, 123.675], [1.0, 1.0, 1.0]
_resize = dataloader.train.mapper.augmentations[0]
_resize.short_edge_length, _resize.sample_style = [480, 800], "range"
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-101.pkl"
train.max_iter = 180000
lr_multiplier.warmup_length = 500 / train.max_iter
train.output_dir = "output/gfl_R_101_FPN_2x"
