"""ICD on the generated shapes once more, with FCOS: everything is as in ``shapes.py``, nothing was tuned for it."""

from .shapes import on_shapes

runs, study = on_shapes(
    "baselines/fcos_small_shapes.py",
    title="ICD on generated shapes: FCOS, a thin student and its teacher",
    seeds=[0],
)
