"""ICD on the generated shapes, from a teacher that ``studies/shapes.py`` has trained.

d2kd train --config-file projects/ICD/configs/icd_shapes.py model.teacher.weights=WEIGHTS

Some hundreds of steps, and a pyramid 32 channels wide: what differs from the published settings is here.
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

model.losses.icd.heads = 4  # of 8 channels: fewer would leave a normalised vector little to tell
# No object is large enough for p7: only there to say no, the teacher's is eight times as strong as the others.
model.losses.icd.levels = ["p3", "p4", "p5", "p6"]
# The published decoder finds where to look in some ten thousand iterations.
model.losses.icd.query_positions = True
model.losses.icd.normalize_keys = True
model.losses.icd.aux_warmup = 0.3
model.losses.icd.start = 0.1
train.loss_optimizer.optimizer.lr = 2e-3  # the published 1e-4 has 90k iterations to get somewhere
