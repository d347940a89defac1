"""Average precision computed from matches, and its confidence interval by a paired bootstrap over images.

Notation: as in :mod:`.matching`; B is the number of bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .matching import AREAS, IOUS, GroundTruth, Matches

RECALLS = np.linspace(0.0, 1.0, 101)
"""Recall thresholds of COCO's interpolated precision."""
METRICS = {
    "AP": ("all", slice(None)),
    "AP50": ("all", slice(0, 1)),
    "AP75": ("all", slice(5, 6)),
    "APs": ("small", slice(None)),
    "APm": ("medium", slice(None)),
    "APl": ("large", slice(None)),
}
"""Metric -> its area range, and its slice of :data:`.IOUS`."""
LABELS = {"APs": "AP small", "APm": "AP medium", "APl": "AP large"}
"""Labels in tables; a metric that is missing here is labelled with its name."""
CELLS = 8_000_000
"""Maximum number of entries of a temporary array of the bootstrap: 4 bytes each, a few arrays at a time."""


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of a detector. Values are in [0, 100], and None where they are undefined.

    Attributes:
        metrics: :data:`METRICS`, averaged over the selected classes.
        per_class: AP of each class of the data set, selected or not.
        precision: precision at the 101 recall thresholds, at IoU 0.5, averaged over the selected classes.
        best: the score threshold of the highest F1, with precision, recall and F1. Detections of all selected
            classes are pooled; IoU 0.5.
        fixed: the same values at a given threshold.
    """

    metrics: dict[str, float | None]
    per_class: dict[str, float | None]
    precision: list[float]
    best: dict[str, float | None]
    fixed: dict[str, float | None]


def interpolated_precision(is_tp: np.ndarray, is_fp: np.ndarray, objects: int) -> np.ndarray:
    """Compute COCO's interpolated precision at :data:`RECALLS`.

    Args:
        is_tp, is_fp: (T, D) bool, true and false positives, sorted by descending score. A detection that is
            neither is ignored.
        objects: number of ground-truth objects, at least 1.

    Returns:
        (T, 101).
    """
    values = np.zeros((len(is_tp), len(RECALLS)))
    if is_tp.shape[1]:
        tp, fp = (np.cumsum(x, axis=1).astype(float) for x in (is_tp, is_fp))
        recall, precision = tp / objects, tp / (fp + tp + np.spacing(1))
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        for row in range(len(is_tp)):
            places = np.searchsorted(recall[row], RECALLS, side="left")
            reached = places < recall.shape[1]
            values[row, reached] = precision[row, places[reached]]
    return values


def precision_array(truth: GroundTruth, matches: Matches) -> np.ndarray:
    """Return (T, 101, K, A), COCOeval's ``eval["precision"]`` for 100 detections; -1 where a class has no object."""
    result = np.full((len(IOUS), len(RECALLS), len(truth.classes), len(AREAS)), -1.0)
    is_tp, is_fp = matches.is_tp, (matches.object < 0) & ~matches.ignored
    for k, (begin, end) in enumerate(zip(matches.starts[:-1], matches.starts[1:])):
        for a in range(len(AREAS)):
            objects = int((~matches.objects_ignored[a] & (truth.label == k)).sum())
            if objects:
                at = (slice(None), a, slice(begin, end))
                result[:, :, k, a] = interpolated_precision(is_tp[at], is_fp[at], objects)
    return result


def mean_precision(values: np.ndarray) -> float | None:
    """Return the mean of the defined values (> -1), in [0, 100]; None if there is none."""
    defined = values[values > -1]
    return float(np.mean(defined) * 100) if len(defined) else None


def compute_accuracy(
    truth: GroundTruth, matches: Matches, classes: Sequence[int], threshold: float
) -> Accuracy:
    """Compute the accuracy of a detector.

    Args:
        truth: the ground truth.
        matches: matches of the detector.
        classes: indices of the classes that means are taken over.
        threshold: score threshold of ``Accuracy.fixed``.
    """
    table = precision_array(truth, matches)
    counted = table[:, :, list(classes)]
    areas = list(AREAS)
    at_half = counted[0, :, :, 0]
    defined = (at_half > -1).all(axis=0)
    mean_curve = at_half[:, defined].mean(axis=1) if defined.any() else np.zeros(0)
    score, tp, fp, objects = _pooled(truth, matches, classes)
    return Accuracy(
        metrics={
            name: mean_precision(counted[ious, ..., areas.index(area)])
            for name, (area, ious) in METRICS.items()
        },
        per_class={c: mean_precision(table[:, :, k, 0]) for k, c in enumerate(truth.classes)},
        precision=mean_curve.tolist(),
        best=_best(score, tp, fp, objects),
        fixed=_operating_point(int((score >= threshold).sum()), threshold, tp, fp, objects),
    )


def _pooled(truth: GroundTruth, matches: Matches, classes: Sequence[int]):
    """Return descending scores, cumulative true and false positives at IoU 0.5, and the number of objects."""
    counted = np.isin(matches.detections.label, list(classes)) & ~matches.ignored[0, 0]
    score, is_tp = matches.detections.score[counted], matches.is_tp[0, 0][counted]
    order = np.argsort(-score, kind="stable")
    score, is_tp = score[order], is_tp[order]
    objects = int((~matches.objects_ignored[0] & np.isin(truth.label, list(classes))).sum())
    return score, np.cumsum(is_tp), np.cumsum(~is_tp), objects


def _operating_point(count: int, threshold: float, tp, fp, objects: int) -> dict[str, float | None]:
    found, wrong = (int(tp[count - 1]), int(fp[count - 1])) if count else (0, 0)
    return {
        "threshold": threshold,
        "precision": 100 * found / count if count else None,
        "recall": 100 * found / objects if objects else None,
        "f1": 200 * found / (count + objects) if count + objects else None,
        "found": found,
        "wrong": wrong,
        "objects": objects,
    }


def _best(score, tp, fp, objects: int) -> dict[str, float | None]:
    if not len(score):
        return _operating_point(0, 1.0, tp, fp, objects)
    f1 = 2 * tp / (tp + fp + objects)
    f1[:-1][score[1:] == score[:-1]] = -1  # detections of equal score pass a threshold together
    count = int(np.argmax(f1)) + 1
    return _operating_point(count, float(score[count - 1]), tp, fp, objects)


def class_operating_point(
    truth: GroundTruth,
    matches: Matches,
    k: int,
    precision: float | None = None,
    threshold: float | None = None,
) -> dict[str, float | None]:
    """Choose the score threshold of a class, or measure a given one, at IoU 0.5.

    Args:
        truth: the ground truth.
        matches: matches of the detector.
        k: index of the class.
        precision: minimum precision, in [0, 1]. None: the threshold is that of the highest F1.
        threshold: score threshold that is not chosen, but given.

    Returns:
        dict: ``threshold``, and with it ``precision``, ``recall`` and ``f1`` in [0, 100]; and the number of ``objects``.
        With a minimum precision, the threshold is the lowest score that reaches it. It is None if no score does, or no
        detection is right.
    """
    score, tp, fp, objects = _pooled(truth, matches, [k])
    if threshold is not None:
        return _operating_point(int((score >= threshold).sum()), threshold, tp, fp, objects)
    point = _best(score, tp, fp, objects)
    if precision is not None:
        last_of_score = np.append(score[1:] != score[:-1], True)[: len(score)]
        reached = np.flatnonzero(last_of_score & (tp / (tp + fp) >= precision))
        count = int(reached[-1]) + 1 if len(reached) else 0
        point = _operating_point(count, float(score[count - 1]) if count else 1.0, tp, fp, objects)
    return point if point["found"] else point | {"threshold": None}


def bootstrap_counts(images: int, number: int, seed: int = 0) -> np.ndarray:
    """Return (B, I), how often each image is drawn when I images are sampled with replacement."""
    random = np.random.default_rng(seed)
    counts = np.empty((number, images), dtype=np.int32)
    for row in counts:
        row[:] = np.bincount(random.integers(images, size=images), minlength=images)
    return counts


def bootstrap_ap(
    truth: GroundTruth,
    matches: Matches,
    classes: Sequence[int],
    counts: np.ndarray,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, np.ndarray]:
    """Compute the AP of resampled data sets without matching again. An image that is drawn twice counts twice.

    Args:
        truth, matches, classes: see :func:`compute_accuracy`.
        counts: (B, I), returned by :func:`bootstrap_counts`. Use the same counts for all detectors of a paired bootstrap.
        progress: progress callback, called with (classes done, classes).

    Returns:
        metric -> (B,) in [0, 100], NaN where undefined; and ``"per_class"`` -> (B, K).
    """
    number, classes = len(counts), list(classes)
    all_classes = len(truth.classes)
    shape = (len(IOUS), number, all_classes)
    values = {area: np.empty(shape, dtype=np.float32) for area in AREAS}
    for k in range(all_classes):
        for a, area in enumerate(AREAS):
            values[area][:, :, k] = _class_bootstrap(truth, matches, k, a, counts)
        progress(k + 1, all_classes)
    metrics = {
        name: _nanmean(values[area][ious][:, :, classes].mean(axis=0), axis=1)
        for name, (area, ious) in METRICS.items()
    }
    return metrics | {"per_class": values["all"].mean(axis=0)}


def _nanmean(values: np.ndarray, axis: int) -> np.ndarray:
    defined = np.isfinite(values)
    count = defined.sum(axis=axis)
    total = np.where(defined, values, 0).sum(axis=axis, dtype=np.float64)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _class_bootstrap(truth: GroundTruth, matches: Matches, k: int, a: int, counts: np.ndarray):
    """Return (T, B), the AP in [0, 100] of class ``k`` and area range ``a`` in each resample.

    Precision rises at true positives only, so it is computed at these. The other detections are only counted.
    """
    of_class = slice(matches.starts[k], matches.starts[k + 1])
    objects = truth.image[(truth.label == k) & ~matches.objects_ignored[a]]
    result = np.full((len(IOUS), len(counts)), np.nan, dtype=np.float32)
    if not len(objects):
        return result
    to_find = counts[:, objects].sum(axis=1)
    image = matches.detections.image[of_class]
    is_tp, ignored = matches.is_tp[:, a, of_class], matches.ignored[:, a, of_class]
    # Drop detections that are ignored at all IoUs. Those ignored at some IoUs are subtracted below.
    ever = ~ignored.all(axis=0)
    image, is_tp, ignored = image[ever], is_tp[:, ever], ignored[:, ever]
    tp_columns = np.flatnonzero(is_tp.any(axis=0))
    result[:, to_find > 0] = 0
    if not len(tp_columns):
        return result
    column_of = np.full(len(image), -1)
    column_of[tp_columns] = np.arange(len(tp_columns))
    rows = max(1, CELLS // len(image))
    for begin in range(0, len(counts), rows):
        part = slice(begin, begin + rows)
        weights = counts[part]
        before = np.cumsum(weights[:, image], axis=1, dtype=np.int32)[:, tp_columns]
        for t in range(len(IOUS)):
            at = np.flatnonzero(is_tp[t])
            if not len(at):
                continue
            tp = np.cumsum(weights[:, image[at]], axis=1, dtype=np.int32)
            counted = before[:, column_of[at]]
            skipped = np.flatnonzero(ignored[t])
            if len(skipped):
                total = np.cumsum(weights[:, image[skipped]], axis=1, dtype=np.int32)
                total = np.pad(total, ((0, 0), (1, 0)))
                counted = counted - total[:, np.searchsorted(skipped, at)]
            result[t, part] = _interpolated(tp, counted, to_find[part])
    result[:, to_find == 0] = np.nan
    return result


def _interpolated(tp: np.ndarray, counted: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """Return (B,), COCO's 101-point AP in [0, 100], from (B, N) cumulative counts at the N true positives."""
    precision = tp / np.maximum(counted, 1, dtype=np.float32)
    np.maximum.accumulate(precision[:, ::-1], axis=1, out=precision[:, ::-1])
    # The number of recall thresholds each true positive reaches; its precision counts for the newly reached ones.
    reached = (100 * tp.astype(np.float64) / np.maximum(objects, 1)[:, None] + 1e-9).astype(
        np.int32
    )
    added = np.diff(reached, axis=1, prepend=-1)
    return 100 * np.einsum("bn,bn->b", precision, added.astype(np.float32)) / len(RECALLS)


def percentile_interval(values: np.ndarray) -> list[float] | None:
    """Return the 2.5th and 97.5th percentile of the finite values; None if there is none."""
    values = values[np.isfinite(values)]
    return None if not len(values) else [float(x) for x in np.percentile(values, [2.5, 97.5])]


def paired_gains(
    a: dict[str, Any], b: dict[str, Any], accuracy_a: Accuracy, accuracy_b: Accuracy
) -> dict[str, Any]:
    """Compute the gains of detector a over detector b with paired 95 % bootstrap intervals.

    Args:
        a, b: resampled metrics, returned by :func:`bootstrap_ap` for the same counts.
        accuracy_a, accuracy_b: metrics on the data set itself.

    Returns:
        ``metrics`` and ``per_class``: name -> ``{"gain": …, "interval": [low, high]}``; None where undefined.
    """

    def one(x: float | None, y: float | None, resampled: np.ndarray) -> dict[str, Any]:
        gain = None if x is None or y is None else x - y
        return {"gain": gain, "interval": None if gain is None else percentile_interval(resampled)}

    metrics = {
        name: one(accuracy_a.metrics[name], accuracy_b.metrics[name], a[name] - b[name])
        for name in METRICS
    }
    per_class = {
        name: one(
            accuracy_a.per_class[name],
            accuracy_b.per_class[name],
            a["per_class"][:, k] - b["per_class"][:, k],
        )
        for k, name in enumerate(accuracy_a.per_class)
    }
    return {"metrics": metrics, "per_class": per_class}
