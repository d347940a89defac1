"""Average precision from matches, and how far it would move with other images: a paired bootstrap.

Letters as in :mod:`.matching`; B resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .matching import AREAS, IOUS, Matches, Truth

RECALLS = np.linspace(0.0, 1.0, 101)
"""The recalls at which COCO reads precision."""
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
LABELS = {"APs": "AP small", "APm": "AP medium", "APl": "AP large"}
"""How a table writes those whose name does not say it."""
CELLS = 8_000_000
"""Entries of the largest temporary array of the bootstrap; 4 bytes each, a few of them at a time."""


@dataclass(frozen=True)
class Accuracy:
    """What a detector reached, in 0..100; None where nothing defines it.

    Attributes:
        metrics: :data:`METRICS`, means over the classes that were asked for.
        per_class: AP of each class, asked for or not.
        precision: at the 101 recalls, at IoU 0.5, mean over the classes.
        best: threshold, precision, recall and F1 where F1 is best, all classes together, at IoU 0.5.
        fixed: the same at a threshold that was given.
    """

    metrics: dict[str, float | None]
    per_class: dict[str, float | None]
    precision: list[float]
    best: dict[str, float | None]
    fixed: dict[str, float | None]


def curve(right: np.ndarray, wrong: np.ndarray, objects: int) -> np.ndarray:
    """COCO's interpolated precision at :data:`RECALLS`.

    Args:
        right, wrong: (T, D) of detections from the best to the worst; one that is neither does not count.
        objects: how many there are to be found, more than 0.

    Returns:
        (T, 101).
    """
    values = np.zeros((len(right), len(RECALLS)))
    if right.shape[1]:
        tp, fp = (np.cumsum(x, axis=1).astype(float) for x in (right, wrong))
        recall, precision = tp / objects, tp / (fp + tp + np.spacing(1))
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        for row in range(len(right)):
            places = np.searchsorted(recall[row], RECALLS, side="left")
            reached = places < recall.shape[1]
            values[row, reached] = precision[row, places[reached]]
    return values


def precisions(truth: Truth, matches: Matches) -> np.ndarray:
    """(T, 101, K, A): COCOeval's ``eval["precision"]`` at 100 detections; -1 where a class has no object."""
    result = np.full((len(IOUS), len(RECALLS), len(truth.classes), len(AREAS)), -1.0)
    right, wrong = matches.right, (matches.object < 0) & ~matches.ignored
    for k, (begin, end) in enumerate(zip(matches.starts[:-1], matches.starts[1:])):
        for a in range(len(AREAS)):
            objects = int((~matches.objects_ignored[a] & (truth.label == k)).sum())
            if objects:
                at = (slice(None), a, slice(begin, end))
                result[:, :, k, a] = curve(right[at], wrong[at], objects)
    return result


def mean_precision(values: np.ndarray) -> float | None:
    """The mean in 0..100 of what is defined."""
    defined = values[values > -1]
    return float(np.mean(defined) * 100) if len(defined) else None


def accuracy(truth: Truth, matches: Matches, classes: Sequence[int], threshold: float) -> Accuracy:
    """What a detector reached.

    Args:
        truth: the objects.
        matches: of the detector.
        classes: that count in means.
        threshold: a score, for ``fixed``.
    """
    table = precisions(truth, matches)
    counted = table[:, :, list(classes)]
    named = {
        "AP": counted[..., 0],
        "AP50": counted[0, ..., 0],
        "AP75": counted[5, ..., 0],
        "APs": counted[..., 1],
        "APm": counted[..., 2],
        "APl": counted[..., 3],
    }
    at_half = counted[0, :, :, 0]
    defined = (at_half > -1).all(axis=0)
    mean_curve = at_half[:, defined].mean(axis=1) if defined.any() else np.zeros(0)
    score, tp, fp, objects = _pooled(truth, matches, classes)
    return Accuracy(
        metrics={name: mean_precision(values) for name, values in named.items()},
        per_class={c: mean_precision(table[:, :, k, 0]) for k, c in enumerate(truth.classes)},
        precision=mean_curve.tolist(),
        best=_best(score, tp, fp, objects),
        fixed=_at(int((score >= threshold).sum()), threshold, tp, fp, objects),
    )


def _pooled(truth: Truth, matches: Matches, classes: Sequence[int]):
    """Scores from the best, how many so far are right and wrong at IoU 0.5, and how many objects there are."""
    counted = np.isin(matches.detections.label, list(classes)) & ~matches.ignored[0, 0]
    score, right = matches.detections.score[counted], matches.right[0, 0][counted]
    order = np.argsort(-score, kind="stable")
    score, right = score[order], right[order]
    objects = int((~matches.objects_ignored[0] & np.isin(truth.label, list(classes))).sum())
    return score, np.cumsum(right), np.cumsum(~right), objects


def _at(count: int, threshold: float, tp, fp, objects: int) -> dict[str, float | None]:
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
        return _at(0, 1.0, tp, fp, objects)
    f1 = 2 * tp / (tp + fp + objects)
    f1[:-1][score[1:] == score[:-1]] = -1  # a threshold takes all of equal score
    count = int(np.argmax(f1)) + 1
    return _at(count, float(score[count - 1]), tp, fp, objects)


def resamples(images: int, number: int, seed: int = 0) -> np.ndarray:
    """(B, I) how often each image is drawn, with replacement, I of them each time."""
    random = np.random.default_rng(seed)
    counts = np.empty((number, images), dtype=np.int32)
    for row in counts:
        row[:] = np.bincount(random.integers(images, size=images), minlength=images)
    return counts


def bootstrap(
    truth: Truth,
    matches: Matches,
    classes: Sequence[int],
    counts: np.ndarray,
    report: Callable[[int, int], None] = lambda step, steps: None,
) -> dict[str, np.ndarray]:
    """The AP of resampled data sets, without matching again: an image drawn twice counts twice.

    Args:
        truth, matches, classes: as for :func:`accuracy`.
        counts: (B, I) of :func:`resamples`; pairing is giving the same to all detectors.
        report: told how many classes of how many are done.

    Returns:
        by metric (B,) in 0..100, NaN where a resample defines none; under ``"per_class"`` (B, K).
    """
    number, classes = len(counts), list(classes)
    all_classes = len(truth.classes)
    shape = (len(IOUS), number, all_classes)
    values = {area: np.empty(shape, dtype=np.float32) for area in AREAS}
    for k in range(all_classes):
        for a, area in enumerate(AREAS):
            values[area][:, :, k] = _class_bootstrap(truth, matches, k, a, counts)
        report(k + 1, all_classes)

    def mean(area: str, at: slice) -> np.ndarray:
        return _nanmean(values[area][at][:, :, classes].mean(axis=0), axis=1)

    return {
        "AP": mean("all", slice(None)),
        "AP50": mean("all", slice(0, 1)),
        "AP75": mean("all", slice(5, 6)),
        "APs": mean("small", slice(None)),
        "APm": mean("medium", slice(None)),
        "APl": mean("large", slice(None)),
        "per_class": values["all"].mean(axis=0),
    }


def _nanmean(values: np.ndarray, axis: int) -> np.ndarray:
    defined = np.isfinite(values)
    count = defined.sum(axis=axis)
    total = np.where(defined, values, 0).sum(axis=axis, dtype=np.float64)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _class_bootstrap(truth: Truth, matches: Matches, k: int, a: int, counts: np.ndarray):
    """(T, B) in 0..100 of a class and a range of area.

    Precision rises only where something is found, so it is read at those few places; all detections are needed
    for how many came before.
    """
    of_class = slice(matches.starts[k], matches.starts[k + 1])
    objects = truth.image[(truth.label == k) & ~matches.objects_ignored[a]]
    result = np.full((len(IOUS), len(counts)), np.nan, dtype=np.float32)
    if not len(objects):
        return result
    to_find = counts[:, objects].sum(axis=1)
    image = matches.detections.image[of_class]
    right, ignored = matches.right[:, a, of_class], matches.ignored[:, a, of_class]
    # What never counts is left out at once; what counts at some IoU only is taken off below.
    ever = ~ignored.all(axis=0)
    image, right, ignored = image[ever], right[:, ever], ignored[:, ever]
    anywhere = np.flatnonzero(right.any(axis=0))
    result[:, to_find > 0] = 0
    if not len(anywhere):
        return result
    place = np.full(len(image), -1)
    place[anywhere] = np.arange(len(anywhere))
    rows = max(1, CELLS // len(image))
    for begin in range(0, len(counts), rows):
        part = slice(begin, begin + rows)
        weights = counts[part]
        before = np.cumsum(weights[:, image], axis=1, dtype=np.int32)[:, anywhere]
        for t in range(len(IOUS)):
            at = np.flatnonzero(right[t])
            if not len(at):
                continue
            tp = np.cumsum(weights[:, image[at]], axis=1, dtype=np.int32)
            counted = before[:, place[at]]
            skipped = np.flatnonzero(ignored[t])
            if len(skipped):
                total = np.cumsum(weights[:, image[skipped]], axis=1, dtype=np.int32)
                total = np.pad(total, ((0, 0), (1, 0)))
                counted = counted - total[:, np.searchsorted(skipped, at)]
            result[t, part] = _interpolated(tp, counted, to_find[part])
    result[:, to_find == 0] = np.nan
    return result


def _interpolated(tp: np.ndarray, counted: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """(B,) COCO's 101-point AP in 0..100 from (B, N) running counts at the places where something is found."""
    precision = tp / np.maximum(counted, 1, dtype=np.float32)
    np.maximum.accumulate(precision[:, ::-1], axis=1, out=precision[:, ::-1])
    # How many of the 101 recalls each place has reached; those it adds are read from it.
    reached = (100 * tp.astype(np.float64) / np.maximum(objects, 1)[:, None] + 1e-9).astype(
        np.int32
    )
    added = np.diff(reached, axis=1, prepend=-1)
    return 100 * np.einsum("bn,bn->b", precision, added.astype(np.float32)) / len(RECALLS)


def interval(values: np.ndarray) -> list[float] | None:
    """The middle 95 % of resamples, those that define a value; None if none does."""
    values = values[np.isfinite(values)]
    return None if not len(values) else [float(x) for x in np.percentile(values, [2.5, 97.5])]


def difference(
    ours: dict[str, Any], theirs: dict[str, Any], ours_exact: Accuracy, theirs_exact: Accuracy
) -> dict[str, Any]:
    """Gains of a detector over another with their paired 95 % intervals.

    Returns:
        ``metrics`` and ``per_class``: name -> ``{"gain": …, "interval": [low, high]}``; None where undefined.
    """

    def one(a: float | None, b: float | None, resampled: np.ndarray) -> dict[str, Any]:
        gain = None if a is None or b is None else a - b
        return {"gain": gain, "interval": None if gain is None else interval(resampled)}

    metrics = {
        name: one(ours_exact.metrics[name], theirs_exact.metrics[name], ours[name] - theirs[name])
        for name in METRICS
    }
    per_class = {
        name: one(
            ours_exact.per_class[name],
            theirs_exact.per_class[name],
            ours["per_class"][:, k] - theirs["per_class"][:, k],
        )
        for k, name in enumerate(ours_exact.per_class)
    }
    return {"metrics": metrics, "per_class": per_class}
