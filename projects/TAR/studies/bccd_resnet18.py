"""What a ResNet-18 learns from a ResNet-50 on blood cells, by TAR and by ICD.

Data as in ``bccd.py``: D2KD_BCCD points to them, ``test`` is read once, and learning rates were chosen on ``val`` with
another seed, as many for the teacher as for the student. The losses' settings are those of the shapes.
"""

from ....configs.common.study import on_blood_cells, taught, thin
from ...ICD.studies.common import icd_method
from .common import compared, study_of

STUDENT_STEPS, TEACHER_STEPS = 400, 600


def resnet(name, steps, lr):
    recipe = thin("baselines/faster_rcnn_resnet_bccd.py", steps)
    recipe.model.backbone.bottom_up.name = name
    recipe.optimizer.lr = lr
    return recipe


_student = resnet("resnet18", STUDENT_STEPS, 1e-3)
_teacher = resnet("resnet50", TEACHER_STEPS, 1e-3)

runs = compared(_student, _teacher)
runs["icd"] = taught(_student, _teacher, **icd_method())
study = study_of(
    runs,
    title="TAR and ICD on blood cells: ResNet-18 from ResNet-50, Faster R-CNN",
    **on_blood_cells(_student),
)
