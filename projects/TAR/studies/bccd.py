"""Does TAR help a small Faster R-CNN on photographs: blood cells, with real annotations and their faults?

The runs of ``shapes.py``, on data that D2KD_BCCD points to. Nothing is chosen on ``test``, which is read once, by a
run's last weights: learning rates were on ``val`` with another seed, the losses' weights are those of ``shapes.py``.
Its 72 images are few, and a gain is to be believed over several seeds only.
"""

from ....configs.common.study import blood_cells
from .common import compared, study_of

STUDENT_STEPS, TEACHER_STEPS = 600, 1000


def on_blood_cells(baseline, title):
    """The runs and the study of a thin detector and its wider teacher."""
    student, teacher, options = blood_cells(baseline, STUDENT_STEPS, TEACHER_STEPS)
    runs = compared(student, teacher)
    return runs, study_of(runs, title=title, **options)


runs, study = on_blood_cells(
    "baselines/faster_rcnn_small_bccd.py",
    "TAR on blood cells: Faster R-CNN, a thin student and its teacher",
)
