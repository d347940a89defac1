"""TAR and ICD on blood cells: ResNet-18 from ResNet-50.

The data are those of ``bccd.py``. Learning rates were chosen on ``val`` with another seed, from as many values for the
teacher as for the student; ``test`` is used for the final weights only. Loss settings are those for shapes.
"""

from ....configs.common.study import bccd_options, distillation_run, student_recipe
from ...ICD.studies.common import icd_settings
from .common import comparison_runs, make_study


def resnet(name, steps, lr):
    recipe = student_recipe("baselines/faster_rcnn_resnet_bccd.py", steps)
    recipe.model.backbone.bottom_up.name = name
    recipe.optimizer.lr = lr
    return recipe


def from_resnet50(teacher_steps):
    """Return the runs and the study."""
    student, teacher = resnet("resnet18", 400, 1e-3), resnet("resnet50", teacher_steps, 1e-3)
    runs = comparison_runs(student, teacher)
    runs["icd"] = distillation_run(student, teacher, **icd_settings())
    title = f"TAR and ICD on blood cells: ResNet-18 from ResNet-50 of {teacher_steps} steps, Faster R-CNN"
    return runs, make_study(runs, title=title, **bccd_options(student))


runs, study = from_resnet50(teacher_steps=600)
