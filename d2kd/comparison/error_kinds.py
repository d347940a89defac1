"""Why a detector loses AP: the error kinds of TIDE, and what each costs.

"TIDE: A General Toolbox for Identifying Object Detection Errors", arXiv 2008.08115, sections 2.2 and 2.3, at IoU 0.5
for a match and 0.1 for the background. Every wrong detection is of one kind, the first that fits:

    localization    of an object's class, and overlaps it by 0.1 to 0.5
    classification  overlaps an object of another class by 0.5 or more
    duplicate       overlaps an object of its class by 0.5 or more, which a better detection has found
    background      overlaps nothing by more than 0.1
    both            what is left: wrong class, and too little overlap

and an object that is not found, nor would be by mending a classification or a localization, is *missed*. What a kind
costs is the AP50 gained by mending that kind alone: a classification or localization error is turned into the object
it meant, the best one where there are several, and dropped where the object is found already; other wrong detections
are dropped; missed objects are taken from those to be found, as if the detector were as precise on them as on the rest.
Where a class has no rest, that tells nothing: it is left out of the mean, unless it has wrong detections, which make
it 0. The gains do not add up to what AP lacks.

The published tool (tidecv 1.0.1, of 2020) wants pandas and seaborn only to be imported, and counts one detection at a
time. Its order of tests and its means after mending are kept. Other here: detections that COCO ignores (in a crowd)
are no errors, and a class without objects is left out of the mean, as everywhere in COCO's AP; so that AP50 is the
one reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .accuracy import curve, mean_precision
from .matching import Matches, Truth, overlapping

FOREGROUND, BACKGROUND = 0.5, 0.1
KINDS = ("classification", "localization", "both", "duplicate", "background", "missed")
CLS, LOC, BOTH, DUP, BKG, MISS = range(6)


@dataclass(frozen=True)
class ErrorKinds:
    """What is wrong with a detector.

    Attributes:
        AP50: as it is.
        count: kind -> detections, of "missed" objects, of that kind.
        cost: kind -> AP50, in points, that mending it would give; at least 0; None where no class is left to tell.
    """

    AP50: float | None
    count: dict[str, int]
    cost: dict[str, float | None]


@dataclass(frozen=True)
class Errors:
    """The errors one by one.

    Attributes:
        kind: (D,) index in :data:`KINDS`, -1 for right and ignored detections.
        meant: (D,) the object that a classification or localization error meant, else -1.
        mends: (D,) whether it is the best of those that mean an object nobody found.
        missed: (G,).
    """

    kind: np.ndarray
    meant: np.ndarray
    mends: np.ndarray
    missed: np.ndarray


def find_errors(truth: Truth, matches: Matches) -> Errors:
    """Tell the kind of every wrong detection, and the objects that are missed."""
    detections, total = matches.detections, len(matches.detections)
    right, ignored = matches.right[0, 0], matches.ignored[0, 0]
    d, g, iou = overlapping(truth, detections, BACKGROUND, same_class=False)
    single = ~truth.crowd[g]
    d, g, iou = d[single], g[single], iou[single]
    same = detections.label[d] == truth.label[g]
    own, own_object = _largest(d[same], g[same], iou[same], total)
    other, other_object = _largest(d[~same], g[~same], iou[~same], total)
    found = np.zeros(len(truth), dtype=bool)
    found[matches.object[0, 0, right]] = True

    kind = np.full(total, BOTH)
    kind[np.maximum(own, other) <= BACKGROUND] = BKG
    kind[own >= FOREGROUND] = DUP
    kind[other >= FOREGROUND] = CLS
    kind[(BACKGROUND <= own) & (own <= FOREGROUND)] = LOC
    kind[right | ignored] = -1
    meant = np.where(kind == CLS, other_object, np.where(kind == LOC, own_object, -1))

    mends = np.zeros(total, dtype=bool)
    able = np.flatnonzero(meant >= 0)
    able = able[~found[meant[able]]]
    order = able[np.lexsort((able, -detections.score[able], meant[able]))]
    mends[order[np.r_[True, meant[order][1:] != meant[order][:-1]][: len(order)]]] = True
    missed = ~found & ~truth.crowd
    missed[meant[able]] = False
    return Errors(kind, meant, mends, missed)


def _largest(d: np.ndarray, g: np.ndarray, iou: np.ndarray, total: int):
    """For each detection its largest IoU, 0 without any, and with which object; the first of equals."""
    order = np.lexsort((-g, iou, d))
    best, which = np.zeros(total), np.full(total, -1)
    best[d[order]], which[d[order]] = iou[order], g[order]  # the last assignment stays
    return best, which


def error_kinds(truth: Truth, matches: Matches, classes: Sequence[int]) -> ErrorKinds:
    """Count the errors of each kind and say what they cost.

    Args:
        truth, matches: objects and detections.
        classes: that count.
    """
    errors = find_errors(truth, matches)
    label, classes = matches.detections.label, list(classes)
    counted = np.isin(label, classes)
    count = {name: int(((errors.kind == k) & counted).sum()) for k, name in enumerate(KINDS)}
    count["missed"] = int((errors.missed & np.isin(truth.label, classes)).sum())
    before = _ap50(truth, matches, classes)
    cost: dict[str, float | None] = {}
    for k, name in enumerate(KINDS):
        after = _ap50(truth, matches, classes, errors, k)
        cost[name] = None if before is None or after is None else max(after - before, 0.0)
    return ErrorKinds(before, count, cost)


def _ap50(
    truth: Truth,
    matches: Matches,
    classes: Sequence[int],
    errors: Errors | None = None,
    kind: int = -1,
) -> float | None:
    """AP50 with the errors of one kind mended."""
    score, label = matches.detections.score, matches.detections.label
    right, kept = matches.right[0, 0], ~matches.ignored[0, 0]
    to_find = ~matches.objects_ignored[0]
    if errors is not None:
        of_kind = errors.kind == kind
        mended = of_kind & errors.mends & (kind in (CLS, LOC))
        label = np.where(mended, truth.label[errors.meant] if len(truth) else label, label)
        right, kept = right | mended, kept & (~of_kind | mended)
        if kind == MISS:
            to_find = to_find & ~errors.missed
        score, label, right = score[kept], label[kept], right[kept]
        order = np.lexsort((-score, label))
        score, label, right = score[order], label[order], right[order]
    else:
        label, right = label[kept], right[kept]
    objects = np.bincount(truth.label[to_find], minlength=len(truth.classes))
    had_any = np.bincount(truth.label[~matches.objects_ignored[0]], minlength=len(truth.classes))
    starts = np.searchsorted(label, np.arange(len(truth.classes) + 1))
    values = np.full(len(truth.classes), -1.0)
    for k in classes:
        at = right[None, starts[k] : starts[k + 1]]
        if objects[k]:
            values[k] = curve(at, ~at, int(objects[k])).mean()
        elif had_any[k] and at.size:
            values[k] = 0.0  # every object was missed: what was detected is wrong
    return mean_precision(values[list(classes)])
