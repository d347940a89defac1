"""Ablations of ICD: the tasks that train its decoder, the decoder's size, and the weights of the cells.

Detectors and schedule are those of ``shapes.py``; in the same output folder, its runs are not repeated.
"""

import copy

from .shapes import runs, study

# Name of a run -> its differences from ICD in shapes.py.
ABLATIONS = {
    "icd_identification": dict(localization_weight=0),
    "icd_localization": dict(identification_weight=0),
    "icd_box": dict(weights="box"),
    "icd_1_head": dict(heads=1),
    "icd_2_layers": dict(layers=2),
}

study.title = "ICD's parts on generated shapes: RetinaNet, a thin student and its teacher"
study.seeds = [0]
study.compare = ["icd"]
for _method, _run in runs.items():  # the others are in shapes.py
    _run.optional = _method not in ("teacher", "baseline", "icd", "icd_uniform")
for _method, _options in ABLATIONS.items():
    runs[_method] = copy.deepcopy(runs["icd"])
    runs[_method].config.model.losses.icd.update(_options)
