"""Localization distillation on reference arrays, by the loss that training uses."""

from __future__ import annotations

from torch import Tensor

from d2kd.losses import LDLoss

from . import Arrays
from .dense import atss_labels, by_level, gfl_gradients, gfl_pair


def outputs(arrays: Arrays) -> dict[str, Tensor]:
    """What :class:`LDLoss` makes of the inputs, in its published form.

    Raises:
        InputError: an array is missing.
    """
    loss = LDLoss(
        main_weight=float(arrays["ld_weight"]),
        vlr_weight=float(arrays["vlr_weight"]),
        class_weight=float(arrays["kd_weight"]),
        temperature=float(arrays["ld_temperature"]),
        class_temperature=float(arrays["kd_temperature"]),
        vlr="published",
    )
    student, teacher = gfl_pair(arrays, loss)
    terms = loss.anchor_terms(student, teacher)
    total = sum(term.sum() for term in terms.values())
    total.backward()
    found = {
        "atss_labels": atss_labels(student),
        "vlr_region": loss.region(student),
        "loss": total.detach(),
    }
    loss.vlr = "diou"
    found["paper/vlr_region"] = loss.region(student)
    for name, term in (("main", "main"), ("vlr", "vlr"), ("classification", "class")):
        found |= by_level(arrays, f"loss/{name}", terms[term], student.anchors)
    return found | gfl_gradients(arrays, student)
