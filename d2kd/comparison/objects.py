"""The objects each detector finds, and the images and objects in which two detectors differ most.

A detector finds an object if a detection of its class is matched with it at IoU 0.5, as in COCO, and its score is at
least the threshold of the detector's highest F1. So detectors with different score scales are comparable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .detectors import EvaluationData
from .matching import Matches

NUM_SHOWN = 6
"""Number of won and of lost objects that are shown, and default number of images in the gallery."""


@dataclass(frozen=True)
class Picture:
    """An image to be shown.

    Attributes:
        file_name, image_id: the image.
        truth: its objects, dicts of ``box`` (XYXY), ``label`` and ``crowd``.
        detections: detector -> its detections above its threshold, dicts of ``box``, ``label``, ``score`` and ``object``
            (index of the matched object in ``truth``, or None). With masks, these dicts have a ``mask``, too, an RLE.
        won, lost: indices in ``truth``.
    """

    file_name: str
    image_id: Any
    truth: list[dict[str, Any]]
    detections: dict[str, list[dict[str, Any]]]
    won: list[int]
    lost: list[int]


@dataclass(frozen=True)
class ChangedObject:
    """An object that one of two detectors finds; ``picture`` indexes FoundObjects.pictures, ``object`` Picture.truth."""

    picture: int
    object: int
    score: float


@dataclass(frozen=True)
class FoundObjects:
    """The objects found by each detector.

    Attributes:
        thresholds: detector -> score threshold of its detections.
        found_by_counts: rows of ``found_by`` (names of detectors) and ``objects`` (the number found by exactly these).
        won, lost: number of objects found by the featured detector but not by the baseline, and the reverse.
        by_class, by_size: name -> ``{"won": …, "lost": …}``.
        pictures: images that the following attributes refer to.
        won_objects, lost_objects: those with the highest scores, from different images where possible.
        gallery: indices in ``pictures`` of the images with most won and lost objects.
    """

    thresholds: dict[str, float]
    found_by_counts: list[dict[str, Any]]
    won: int
    lost: int
    by_class: dict[str, dict[str, int]]
    by_size: dict[str, dict[str, int]]
    pictures: list[Picture] = field(default_factory=list)
    won_objects: list[ChangedObject] = field(default_factory=list)
    lost_objects: list[ChangedObject] = field(default_factory=list)
    gallery: list[int] = field(default_factory=list)


def count_found_objects(
    data: EvaluationData,
    matches: dict[str, Matches],
    thresholds: dict[str, float],
    classes: Sequence[int],
    baseline: str,
    featured: str,
    images: int = NUM_SHOWN,
) -> FoundObjects:
    """Count the found objects, and select the objects and images to show.

    Args:
        data: the data set.
        matches, thresholds: detector -> its matches, and its score threshold.
        classes: indices of the classes that all detectors have; others are not counted.
        baseline, featured: names of the two detectors to compare.
        images: number of images in the gallery.
    """
    truth = data.truth
    counted = ~truth.crowd & np.isin(truth.label, list(classes))
    scores = {name: m.found_at() for name, m in matches.items()}
    found = {name: (scores[name] >= thresholds[name]) & counted for name in matches}
    code = sum(found[name].astype(int) << e for e, name in enumerate(found))
    sums = np.bincount(code[counted], minlength=2 ** len(found))
    found_by_counts = [
        {"found_by": [n for e, n in enumerate(found) if c >> e & 1], "objects": int(count)}
        for c, count in enumerate(sums)
    ]
    won, lost = found[featured] & ~found[baseline], found[baseline] & ~found[featured]

    def both(chosen: np.ndarray) -> dict[str, int]:
        return {"won": int((won & chosen).sum()), "lost": int((lost & chosen).sum())}

    shown: dict[int, int] = {}  # image -> index in pictures

    def changes(which: np.ndarray, score: np.ndarray) -> list[ChangedObject]:
        picked = _of_different_images(np.flatnonzero(which), score, truth.image, NUM_SHOWN)
        return [
            ChangedObject(
                shown.setdefault(int(truth.image[g]), len(shown)), int(g), float(score[g])
            )
            for g in picked
        ]

    won_objects = changes(won, scores[featured])
    lost_objects = changes(lost, scores[baseline])
    changed = np.bincount(truth.image[won | lost], minlength=len(truth.image_ids))
    most = [int(i) for i in np.argsort(-changed, kind="stable")[:images] if changed[i]]
    gallery = [shown.setdefault(i, len(shown)) for i in most]
    pictures = [_picture(i, data, matches, thresholds, won, lost) for i in shown]
    index_of = {
        g: n for i in shown for n, g in enumerate(np.flatnonzero(truth.image == i).tolist())
    }
    return FoundObjects(
        thresholds=dict(thresholds),
        found_by_counts=found_by_counts,
        won=int(won.sum()),
        lost=int(lost.sum()),
        by_class={truth.classes[k]: both(truth.label == k) for k in classes},
        by_size={s: both(truth.size == n) for n, s in enumerate(("small", "medium", "large"))},
        pictures=pictures,
        won_objects=[ChangedObject(c.picture, index_of[c.object], c.score) for c in won_objects],
        lost_objects=[ChangedObject(c.picture, index_of[c.object], c.score) for c in lost_objects],
        gallery=gallery,
    )


def _of_different_images(
    chosen: np.ndarray, score: np.ndarray, image: np.ndarray, number: int
) -> list[int]:
    """Select by descending score: first one of each image, then the others."""
    order = chosen[np.argsort(-score[chosen], kind="stable")]
    first, seen = [], set()
    for g in order.tolist():
        if image[g] not in seen:
            first.append(g)
            seen.add(image[g])
    rest = [g for g in order.tolist() if g not in set(first)]
    return [*first, *rest][:number]


def _picture(
    i: int,
    data: EvaluationData,
    matches: dict[str, Matches],
    thresholds: dict[str, float],
    won: np.ndarray,
    lost: np.ndarray,
) -> Picture:
    truth = data.truth
    indices = np.flatnonzero(truth.image == i)
    index_of = {g: n for n, g in enumerate(indices.tolist())}
    record = next(r for r in data.records if data.index_of[r["image_id"]] == i)
    seen = {}
    with_masks = any(m.detections.mask is not None for m in matches.values())
    masks = data.masks if with_masks else None
    for name, m in matches.items():
        at = np.flatnonzero((m.detections.image == i) & (m.detections.score >= thresholds[name]))
        at = at[np.argsort(-m.detections.score[at], kind="stable")]
        seen[name] = [
            {
                "box": _xyxy(m.detections.box[d]),
                "label": int(m.detections.label[d]),
                "score": float(m.detections.score[d]),
                "object": index_of.get(int(m.object[0, 0, d])) if m.is_tp[0, 0, d] else None,
                **_mask(m.detections.mask, d),
            }
            for d in at
        ]
    return Picture(
        file_name=str(record["file_name"]),
        image_id=record["image_id"],
        truth=[
            {
                "box": _xyxy(truth.box[g]),
                "label": int(truth.label[g]),
                "crowd": bool(truth.crowd[g]),
                **_mask(masks, g),
            }
            for g in indices
        ],
        detections=seen,
        won=[index_of[g] for g in indices.tolist() if won[g]],
        lost=[index_of[g] for g in indices.tolist() if lost[g]],
    )


def _mask(masks: np.ndarray | None, place: int) -> dict[str, Any]:
    return {} if masks is None else {"mask": masks[place]}


def _xyxy(box: np.ndarray) -> list[float]:
    x, y, w, h = box.tolist()
    return [x, y, x + w, y + h]
