"""How much of four generated shapes is forgotten while the other four are learned?

A thin GFL learns four classes, and then four more from images in which only these are labelled: by fine-tuning, with
all old logits kept (LwF, our port), by ERD. Beside them the same detector learns all eight at once. The schedule is cut
to fit one seed into twenty minutes on two cores.
"""

from ....configs.common.study import fast_shapes
from .common import in_steps, study_of

STEPS = 1400

runs = in_steps("baselines/gfl_small_shapes.py", "4+4", 2, STEPS)
study = study_of(
    "Learning generated shapes in two steps: GFL, by fine-tuning, LwF and ERD",
    "shapes_test",
    "4+4",
    2,
    seeds=[0],
    **fast_shapes,
)
