"""ICD on generated shapes, with the teacher of ``studies/shapes.py``.

d2kd train --config-file projects/ICD/configs/icd_shapes.py model.teacher.weights=WEIGHTS

Settings that differ from the paper are for a short schedule and an FPN of 32 channels.
"""

from detectron2.config import LazyCall as L

from d2kd.config import distill, get_config, method
from d2kd.modeling import Teacher

model, dataloader, optimizer, lr_multiplier, train = distill(
    "baselines/retinanet_small_shapes.py",
    teacher=L(Teacher)(
        detector=get_config("common/models/retinanet_small.py").model,
        weights="output/icd_shapes/teacher/model_final.pth",
    ),
    **method("icd"),
)

model.losses.icd.heads = 4  # of 8 channels; normalised vectors of fewer lose too much
# No object is assigned to p7, where the teacher's features are eight times as large as on the other levels.
model.losses.icd.levels = ["p3", "p4", "p5", "p6"]
# The published decoder needs about ten thousand iterations to learn where to attend.
model.losses.icd.query_positions = True
model.losses.icd.normalize_keys = True
model.losses.icd.aux_warmup = 0.3
model.losses.icd.start = 0.1
train.loss_optimizer.optimizer.lr = 2e-3  # published: 1e-4 for 90k iterations
