"""ICD on blood cells: Faster R-CNN, with the teacher of ``studies/bccd_faster_rcnn.py``.

D2KD_BCCD=…/BCCD d2kd train --config-file projects/ICD/configs/icd_bccd_faster_rcnn.py
"""

from d2kd.config import distill, get_config

_shapes = get_config("projects/ICD/configs/icd_shapes.py")

model, dataloader, optimizer, lr_multiplier, train = distill(
    "baselines/faster_rcnn_small_bccd.py",
    teacher=(
        "common/models/faster_rcnn_small.py",
        "output/icd_bccd_faster_rcnn/teacher/model_final.pth",
    ),
    losses=_shapes.model.losses,
    loss_optimizer=_shapes.train.loss_optimizer,
)

model.teacher.detector.roi_heads.num_classes = 3
model.losses.icd.levels = None  # all common levels
