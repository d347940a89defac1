"""TAR on generated shapes, with the teacher of ``studies/shapes.py``.

d2kd train --config-file projects/TAR/configs/tar_shapes.py model.teacher.weights=WEIGHTS

The loss weights were chosen on ``shapes_val`` with a seed that no study uses.
"""

from detectron2.config import LazyCall as L

from d2kd.config import distill, get_config
from d2kd.losses import DistillLosses, TARLoss
from d2kd.modeling import Teacher

model, dataloader, optimizer, lr_multiplier, train = distill(
    get_config("baselines/faster_rcnn_small_shapes.py"),
    teacher=L(Teacher)(
        detector=get_config("common/models/faster_rcnn_small.py").model,
        weights="output/shapes/teacher/model_final.pth",
    ),
    losses=L(DistillLosses)(
        tar=L(TARLoss)(
            normalize=False, feature_weight=0.1, classification_weight=10.0, regression_weight=0.3
        )
    ),
)
