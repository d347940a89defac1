"""The study of ``bccd.py`` with a dense detector."""

from .bccd import on_blood_cells

runs, study = on_blood_cells(
    "baselines/retinanet_small_bccd.py",
    "TAR on blood cells: RetinaNet, a thin student and its teacher",
)
