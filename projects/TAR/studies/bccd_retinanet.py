"""The study of ``bccd.py`` with a dense detector."""

from .bccd import bccd_study

runs, study = bccd_study(
    "baselines/retinanet_small_bccd.py",
    "TAR on blood cells: RetinaNet, a thin student and its teacher",
)
