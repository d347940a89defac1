"""Does TAR improve a small Faster R-CNN on photographs of blood cells, with real annotations and their errors?

The runs are those of ``shapes.py``, on the data in D2KD_BCCD. No setting is chosen on ``test``, on which only the final
weights are evaluated: learning rates are from ``val`` with another seed, loss weights are those of ``shapes.py``.
``test`` has only 72 images, so a gain is reliable only over several seeds.
"""

from ....configs.common.study import bccd_recipes
from .common import comparison_runs, make_study

STUDENT_STEPS, TEACHER_STEPS = 600, 1000


def bccd_study(baseline, title):
    """Return the runs and the study of a small detector and its wider teacher."""
    student, teacher, options = bccd_recipes(baseline, STUDENT_STEPS, TEACHER_STEPS)
    runs = comparison_runs(student, teacher)
    return runs, make_study(runs, title=title, **options)


runs, study = bccd_study(
    "baselines/faster_rcnn_small_bccd.py",
    "TAR on blood cells: Faster R-CNN, a thin student and its teacher",
)
