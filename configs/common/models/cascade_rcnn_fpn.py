"""Cascade R-CNN R-50 FPN: the model zoo's Cascade Mask R-CNN without its mask head."""

from detectron2 import model_zoo

model = model_zoo.get_config("common/models/cascade_rcnn.py").model
for _key in ("mask_in_features", "mask_pooler", "mask_head"):
    model.roi_heads.pop(_key)
