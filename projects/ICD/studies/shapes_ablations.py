"""What of ICD does the work: the tasks that train its decoder, the decoder's size, and where it is compared.

The detectors and the schedule of ``shapes.py``: in its output folder what was trained there is not trained again.
"""

import copy

from .shapes import runs, study

# By a run's name, what differs from ICD as in shapes.py.
VARIED = {
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
for _method, _options in VARIED.items():
    runs[_method] = copy.deepcopy(runs["icd"])
    runs[_method].config.model.losses.icd.update(_options)
