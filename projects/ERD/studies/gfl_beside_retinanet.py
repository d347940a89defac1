"""How good is GFL? Beside a RetinaNet of the same thin backbone and the same schedule, on the generated shapes.

Both learn alone. Each one's learning rate is the best of the same four on ``shapes_val``, with another seed.
"""

from ....configs.common.study import fast_shapes, thin

STEPS = 2000

runs = dict(
    retinanet=dict(config=thin("baselines/retinanet_small_shapes.py", STEPS)),
    gfl=dict(config=thin("baselines/gfl_small_shapes.py", STEPS)),
)
study = dict(
    title="GFL beside RetinaNet: the same thin backbone, on generated shapes",
    test="shapes_test",
    baseline="retinanet",
    featured="gfl",
    seeds=[0, 1, 2],
    **fast_shapes,
)
