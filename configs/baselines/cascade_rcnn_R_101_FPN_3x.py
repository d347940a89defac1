"""Cascade R-CNN R-101 FPN on COCO, 3x schedule: a teacher that is not in the model zoo."""

from detectron2 import model_zoo

from .cascade_rcnn_R_50_FPN_1x import dataloader, model, optimizer, train  # noqa: F401

lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_3x

model.backbone.bottom_up.stages.depth = 101
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-101.pkl"
train.max_iter = 270000
train.output_dir = "output/cascade_rcnn_R_101_FPN_3x"
