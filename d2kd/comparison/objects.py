"""Object by object: who finds it, and the images and objects in which two detectors differ most.

An object is found if a detection of its class overlaps it by 0.5 or more, matched as COCO does, with a score at which
that detector's F1 is best: detectors of other scales of score are compared each at its best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .detectors import Data
from .matching import Matches

NUMBER = 6
"""Objects shown on each side, and images in the gallery unless told otherwise."""


@dataclass(frozen=True)
class Picture:
    """An image to be shown.

    Attributes:
        file_name, image_id: which.
        truth: its objects: ``box`` XYXY, ``label`` and ``crowd``.
        seen: detector -> what it says above its threshold: ``box``, ``label``, ``score``, and ``object``, the place in
            ``truth`` of what it finds, or None.
        won, lost: places in ``truth``.
    """

    file_name: str
    image_id: Any
    truth: list[dict[str, Any]]
    seen: dict[str, list[dict[str, Any]]]
    won: list[int]
    lost: list[int]


@dataclass(frozen=True)
class Change:
    """An object that one of two detectors finds; ``picture`` and ``object`` are places in the lists that hold them."""

    picture: int
    object: int
    score: float


@dataclass(frozen=True)
class Objects:
    """Objects found by which detectors.

    Attributes:
        thresholds: detector -> score from which its detections count.
        together: rows of ``found_by``, names of detectors, and how many objects these and no others find.
        won, lost: objects that the featured detector finds and the baseline does not, and the reverse.
        by_class, by_size: name -> ``{"won": …, "lost": …}``.
        pictures: images that the following show.
        won_objects, lost_objects: some of them, of the surest detections, of different images where possible.
        gallery: pictures of the images where most changed.
    """

    thresholds: dict[str, float]
    together: list[dict[str, Any]]
    won: int
    lost: int
    by_class: dict[str, dict[str, int]]
    by_size: dict[str, dict[str, int]]
    pictures: list[Picture] = field(default_factory=list)
    won_objects: list[Change] = field(default_factory=list)
    lost_objects: list[Change] = field(default_factory=list)
    gallery: list[int] = field(default_factory=list)


def objects_found(
    data: Data,
    matches: dict[str, Matches],
    thresholds: dict[str, float],
    classes: Sequence[int],
    baseline: str,
    featured: str,
    images: int = NUMBER,
) -> Objects:
    """Count, and choose what to show.

    Args:
        data: the data set.
        matches, thresholds: of each detector.
        classes: that all know; others do not count.
        baseline, featured: the two whose difference is asked for.
        images: in the gallery.
    """
    truth = data.truth
    counted = ~truth.crowd & np.isin(truth.label, list(classes))
    scores = {name: m.found_at() for name, m in matches.items()}
    found = {name: (scores[name] >= thresholds[name]) & counted for name in matches}
    code = sum(found[name].astype(int) << e for e, name in enumerate(found))
    sums = np.bincount(code[counted], minlength=2 ** len(found))
    together = [
        {"found_by": [n for e, n in enumerate(found) if c >> e & 1], "objects": int(count)}
        for c, count in enumerate(sums)
    ]
    won, lost = found[featured] & ~found[baseline], found[baseline] & ~found[featured]

    def both(chosen: np.ndarray) -> dict[str, int]:
        return {"won": int((won & chosen).sum()), "lost": int((lost & chosen).sum())}

    shown: dict[int, int] = {}  # image -> its place among the pictures

    def changes(which: np.ndarray, score: np.ndarray) -> list[Change]:
        picked = _of_different_images(np.flatnonzero(which), score, truth.image, NUMBER)
        return [
            Change(shown.setdefault(int(truth.image[g]), len(shown)), int(g), float(score[g]))
            for g in picked
        ]

    won_objects = changes(won, scores[featured])
    lost_objects = changes(lost, scores[baseline])
    moved = np.bincount(truth.image[won | lost], minlength=len(truth.image_ids))
    most = [int(i) for i in np.argsort(-moved, kind="stable")[:images] if moved[i]]
    gallery = [shown.setdefault(i, len(shown)) for i in most]
    pictures = [_picture(i, data, matches, thresholds, won, lost) for i in shown]
    place = {g: n for i in shown for n, g in enumerate(np.flatnonzero(truth.image == i).tolist())}
    return Objects(
        thresholds=dict(thresholds),
        together=together,
        won=int(won.sum()),
        lost=int(lost.sum()),
        by_class={truth.classes[k]: both(truth.label == k) for k in classes},
        by_size={s: both(truth.size == n) for n, s in enumerate(("small", "medium", "large"))},
        pictures=pictures,
        won_objects=[Change(c.picture, place[c.object], c.score) for c in won_objects],
        lost_objects=[Change(c.picture, place[c.object], c.score) for c in lost_objects],
        gallery=gallery,
    )


def _of_different_images(
    chosen: np.ndarray, score: np.ndarray, image: np.ndarray, number: int
) -> list[int]:
    """The surest first, one of each image, then what is left."""
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
    data: Data,
    matches: dict[str, Matches],
    thresholds: dict[str, float],
    won: np.ndarray,
    lost: np.ndarray,
) -> Picture:
    truth = data.truth
    mine = np.flatnonzero(truth.image == i)
    place = {g: n for n, g in enumerate(mine.tolist())}
    record = next(r for r in data.records if data.place[r["image_id"]] == i)
    seen = {}
    for name, m in matches.items():
        at = np.flatnonzero((m.detections.image == i) & (m.detections.score >= thresholds[name]))
        at = at[np.argsort(-m.detections.score[at], kind="stable")]
        seen[name] = [
            {
                "box": _xyxy(m.detections.box[d]),
                "label": int(m.detections.label[d]),
                "score": float(m.detections.score[d]),
                "object": place.get(int(m.object[0, 0, d])) if m.right[0, 0, d] else None,
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
            }
            for g in mine
        ],
        seen=seen,
        won=[place[g] for g in mine.tolist() if won[g]],
        lost=[place[g] for g in mine.tolist() if lost[g]],
    )


def _xyxy(box: np.ndarray) -> list[float]:
    x, y, w, h = box.tolist()
    return [x, y, x + w, y + h]
