"""The question of ``bccd.py``, asked of a dense detector."""

from .bccd import compared

runs, study = compared(
    "baselines/retinanet_small_bccd.py",
    "TAR on blood cells: RetinaNet, a thin student and its teacher",
)
