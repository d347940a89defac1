"""BCKD on reference arrays, by the loss that training uses."""

from __future__ import annotations

import torch
from torch import Tensor

from d2kd.losses import BCKDLoss
from d2kd.losses.dense import positives_per_image
from d2kd.modeling.atss import is_foreground

from . import Arrays
from .dense import atss_labels, by_level, gfl_gradients, gfl_pair


def outputs(arrays: Arrays) -> dict[str, Tensor]:
    """What :class:`BCKDLoss` makes of the inputs, in its published form.

    Raises:
        InputError: an array is missing.
    """
    loss = BCKDLoss(
        class_weight=float(arrays["kd_weight"]),
        box_weight=float(arrays["box_weight"]),
        levels="with_objects",
    )
    student, teacher = gfl_pair(arrays, loss)
    terms = loss.anchor_terms(student, teacher)
    total = sum(term.sum() for term in terms.values())
    total.backward()
    positive = is_foreground(loss.labels(student), student.detector.num_classes)
    sizes = [len(level) for level in student.anchors]
    found = {
        "atss_labels": atss_labels(student),
        "normalizer": positives_per_image(positive).float(),
        "level_has_positives": torch.stack([x.any() for x in positive.split(sizes, dim=1)]),
        "loss": total.detach(),
    }
    for name, term in (("classification", "class"), ("box", "box")):
        found |= by_level(arrays, f"loss/{name}", terms[term], student.anchors)
    return found | gfl_gradients(arrays, student)
