"""Prediction-guided distillation on reference arrays, by the loss that training uses."""

from __future__ import annotations

import torch
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from torch import Tensor

from d2kd.losses import PGDLoss

from . import Arrays
from .dense import anchors_of, levels_of, truth
from .gfl_erd import maps

TOWERS = ("classification", "regression")


def outputs(arrays: Arrays) -> dict[str, Tensor]:
    """What :class:`PGDLoss` makes of the inputs, in its published form and with each image under its own mask.

    Raises:
        InputError: an array is missing.
    """
    levels = levels_of(arrays, "student_classification_feature")
    numbers = {
        "classification_exponent": "quality_exponent/classification",
        "regression_exponent": "quality_exponent/regression",
        "foreground_weight": "alpha",
        "background_weight": "beta",
        "regression_weight": "gamma",
        "attention_weight": "delta",
        "temperature": "temp",
    }
    loss = PGDLoss(
        topk=int(arrays["topk"]),
        level_weights=arrays["level_weights"].tolist(),
        normalize=False,
        **{name: float(arrays[array]) for name, array in numbers.items()},
    )
    students, teachers = (
        {name: maps(arrays, f"{side}_{name}_feature", levels) for name in TOWERS}
        for side in ("student", "teacher")
    )
    logits = [arrays.tensor(f"teacher_class_logits/{level}") for level in levels]
    sizes = [tuple(x.shape[-2:]) for x in logits]
    classes = int(arrays["num_classes"])
    scores = torch.cat([permute_to_N_HWA_K(x, classes) for x in logits], dim=1).sigmoid()
    images = range(len(scores))
    per_cell = logits[0].shape[1] // classes
    found = loss.maps_of(
        scores,
        arrays.tensor("teacher_boxes_xyxy"),
        anchors_of(arrays, [height * width * per_cell for height, width in sizes]),
        [truth(arrays, i) for i in images],
        [{name: arrays.tensor(f"image{i}/uniform/{name}") for name in TOWERS} for i in images],
        sizes,
    )
    of = {f"{name}_map/{p}": x for name, given in found.items() for p, x in zip(levels, given)}
    for masks, prefix in (("all", ""), ("own", "own_mask/")):
        loss.masks = masks
        pairs = {
            name: [(x, teachers[name][p].detach()) for p, x in students[name].items()]
            for name in TOWERS
        }
        terms = loss.terms(pairs, found)
        total = sum(sum(values) for values in terms.values())
        of[f"{prefix}loss"] = total.detach()
        leaves = {(name, p): x for name in TOWERS for p, x in students[name].items()}
        gradients = torch.autograd.grad(total, list(leaves.values()))
        for (name, p), gradient in zip(leaves, gradients):
            if masks == "all" or name == "classification":  # the other is the same
                of[f"{prefix}student_{name}_feature_grad/{p}"] = gradient
                of[f"{prefix}loss/{name}/{p}"] = terms[name][levels.index(p)].detach()
    return of
