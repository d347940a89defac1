"""Compare GFL with a RetinaNet of the same small backbone and the same schedule, on generated shapes.

There is no teacher. Each learning rate is the best of the same four on ``shapes_val``, with another seed.
"""

from ....configs.common.study import fast_shapes, student_recipe

STEPS = 2000

runs = dict(
    retinanet=dict(config=student_recipe("baselines/retinanet_small_shapes.py", STEPS)),
    gfl=dict(config=student_recipe("baselines/gfl_small_shapes.py", STEPS)),
)
study = dict(
    title="GFL beside RetinaNet: the same thin backbone, on generated shapes",
    test="shapes_test",
    baseline="retinanet",
    featured="gfl",
    seeds=[0, 1, 2],
    **fast_shapes,
)
