"""The error types of TIDE, and the AP50 that is lost to each.

"TIDE: A General Toolbox for Identifying Object Detection Errors", arXiv 2008.08115, sections 2.2 and 2.3, with a
foreground IoU of 0.5 and a background IoU of 0.1. A false positive has exactly one type, the first that fits:

    localization    IoU of 0.1 to 0.5 with an object of its class
    classification  IoU of 0.5 or more with an object of another class
    duplicate       IoU of 0.5 or more with an object of its class that is matched with a better detection
    background      IoU of at most 0.1 with every object
    both            all others: wrong class, and IoU of 0.1 to 0.5

An object is *missed* if no detection matches it and no classification or localization error has it as its target.
The cost of a type is the gain in AP50 when this type alone is fixed:

* A classification or localization error becomes a true positive of its target object. Of several errors
  with one target, the one with the highest score becomes the true positive and the others are removed. If the target
  is already matched, all are removed.
* Other false positives are removed.
* Missed objects are removed from the ground truth. A class whose objects are all missed is left out of the mean, or
  has an AP of 0 if it has false positives.

The costs do not add up to 100 - AP50.

The published tool (tidecv 1.0.1, 2020) depends on pandas and seaborn and loops over single detections. The order of
the types and the fixes are the same here. Two differences make AP50 the one COCO reports: detections that COCO ignores
(in a crowd) are not errors, and a class without objects is left out of the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .accuracy import interpolated_precision, mean_precision
from .matching import GroundTruth, Matches, overlapping_pairs

FOREGROUND, BACKGROUND = 0.5, 0.1
ERROR_TYPES = ("classification", "localization", "both", "duplicate", "background", "missed")
CLS, LOC, BOTH, DUP, BKG, MISS = range(6)


@dataclass(frozen=True)
class ErrorTypes:
    """Number and cost of the errors of a detector.

    Attributes:
        AP50: AP50 of the detector.
        count: type -> number of detections, for "missed" of objects.
        cost: type -> gain in AP50 (points, at least 0) when the type is fixed; None if undefined for all classes.
    """

    AP50: float | None
    count: dict[str, int]
    cost: dict[str, float | None]


@dataclass(frozen=True)
class Errors:
    """The error type of each detection, and the missed objects.

    Attributes:
        type: (D,) index in :data:`ERROR_TYPES`, -1 for true positives and ignored detections.
        target: (D,) target object of a classification or localization error, otherwise -1.
        fixes: (D,) whether it has the highest score of the errors with this target, and the target is not matched.
        missed: (G,) whether the object is missed.
    """

    type: np.ndarray
    target: np.ndarray
    fixes: np.ndarray
    missed: np.ndarray


def find_errors(truth: GroundTruth, matches: Matches) -> Errors:
    """Find the error type of every detection, and the missed objects."""
    detections, total = matches.detections, len(matches.detections)
    is_tp, ignored = matches.is_tp[0, 0], matches.ignored[0, 0]
    d, g, iou = overlapping_pairs(truth, detections, BACKGROUND, same_class=False)
    single = ~truth.crowd[g]
    d, g, iou = d[single], g[single], iou[single]
    same = detections.label[d] == truth.label[g]
    own, own_object = _largest(d[same], g[same], iou[same], total)
    other, other_object = _largest(d[~same], g[~same], iou[~same], total)
    found = np.zeros(len(truth), dtype=bool)
    found[matches.object[0, 0, is_tp]] = True

    kind = np.full(total, BOTH)
    kind[np.maximum(own, other) <= BACKGROUND] = BKG
    kind[own >= FOREGROUND] = DUP
    kind[other >= FOREGROUND] = CLS
    kind[(BACKGROUND <= own) & (own <= FOREGROUND)] = LOC
    kind[is_tp | ignored] = -1
    target = np.where(kind == CLS, other_object, np.where(kind == LOC, own_object, -1))

    fixes = np.zeros(total, dtype=bool)
    fixable = np.flatnonzero(target >= 0)
    fixable = fixable[~found[target[fixable]]]
    order = fixable[np.lexsort((fixable, -detections.score[fixable], target[fixable]))]
    fixes[order[np.r_[True, target[order][1:] != target[order][:-1]][: len(order)]]] = True
    missed = ~found & ~truth.crowd
    missed[target[fixable]] = False
    return Errors(kind, target, fixes, missed)


def _largest(d: np.ndarray, g: np.ndarray, iou: np.ndarray, total: int):
    """Return the largest IoU of each detection (0 if none) and its object; the first one of equal IoU."""
    order = np.lexsort((-g, iou, d))
    best, which = np.zeros(total), np.full(total, -1)
    best[d[order]], which[d[order]] = iou[order], g[order]  # the last assignment stays
    return best, which


def count_error_types(truth: GroundTruth, matches: Matches, classes: Sequence[int]) -> ErrorTypes:
    """Count the errors of each type and compute their costs.

    Args:
        truth, matches: ground truth, and matches of the detector.
        classes: indices of the classes that are counted.
    """
    errors = find_errors(truth, matches)
    label, classes = matches.detections.label, list(classes)
    counted = np.isin(label, classes)
    count = {name: int(((errors.type == k) & counted).sum()) for k, name in enumerate(ERROR_TYPES)}
    count["missed"] = int((errors.missed & np.isin(truth.label, classes)).sum())
    before = _ap50(truth, matches, classes)
    cost: dict[str, float | None] = {}
    for k, name in enumerate(ERROR_TYPES):
        after = _ap50(truth, matches, classes, errors, k)
        cost[name] = None if before is None or after is None else max(after - before, 0.0)
    return ErrorTypes(before, count, cost)


def _ap50(
    truth: GroundTruth,
    matches: Matches,
    classes: Sequence[int],
    errors: Errors | None = None,
    kind: int = -1,
) -> float | None:
    """Return AP50 after the errors of one type are fixed."""
    score, label = matches.detections.score, matches.detections.label
    is_tp, kept = matches.is_tp[0, 0], ~matches.ignored[0, 0]
    to_find = ~matches.objects_ignored[0]
    if errors is not None:
        of_kind = errors.type == kind
        fixed = of_kind & errors.fixes & (kind in (CLS, LOC))
        label = np.where(fixed, truth.label[errors.target] if len(truth) else label, label)
        is_tp, kept = is_tp | fixed, kept & (~of_kind | fixed)
        if kind == MISS:
            to_find = to_find & ~errors.missed
        score, label, is_tp = score[kept], label[kept], is_tp[kept]
        order = np.lexsort((-score, label))
        score, label, is_tp = score[order], label[order], is_tp[order]
    else:
        label, is_tp = label[kept], is_tp[kept]
    objects = np.bincount(truth.label[to_find], minlength=len(truth.classes))
    had_any = np.bincount(truth.label[~matches.objects_ignored[0]], minlength=len(truth.classes))
    starts = np.searchsorted(label, np.arange(len(truth.classes) + 1))
    values = np.full(len(truth.classes), -1.0)
    for k in classes:
        at = is_tp[None, starts[k] : starts[k + 1]]
        if objects[k]:
            values[k] = interpolated_precision(at, ~at, int(objects[k])).mean()
        elif had_any[k] and at.size:
            values[k] = 0.0  # all objects are missed: only false positives are left
    return mean_precision(values[list(classes)])
