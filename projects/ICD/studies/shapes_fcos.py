"""The study of ``shapes.py`` with FCOS. All settings are the same; none was tuned for FCOS."""

from .shapes import on_shapes

runs, study = on_shapes(
    "baselines/fcos_small_shapes.py",
    title="ICD on generated shapes: FCOS, a thin student and its teacher",
    seeds=[0],
)
