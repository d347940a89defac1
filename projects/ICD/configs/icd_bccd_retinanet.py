"""ICD on blood cells: RetinaNet, with the teacher of ``studies/bccd_retinanet.py``.

D2KD_BCCD=…/BCCD d2kd train --config-file projects/ICD/configs/icd_bccd_retinanet.py
"""

from d2kd.config import distill, get_config

_shapes = get_config("projects/ICD/configs/icd_shapes.py")

model, dataloader, optimizer, lr_multiplier, train = distill(
    "baselines/retinanet_small_bccd.py",
    teacher=(
        "common/models/retinanet_small.py",
        "output/icd_bccd_retinanet/teacher/model_final.pth",
    ),
    losses=_shapes.model.losses,
    loss_optimizer=_shapes.train.loss_optimizer,
)

model.teacher.detector.num_classes = 3
model.losses.icd.levels = None  # all common levels
