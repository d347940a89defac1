"""Which detection is which object: COCO's matching, for all images, IoU thresholds and sizes at once.

The numbers are those of ``pycocotools.cocoeval.COCOeval`` to the last bit, and the arrays are what everything else in a
comparison is counted from: accuracy, error kinds, objects won and lost.

Letters: I images, K classes, G objects, D detections, T IoU thresholds, A ranges of area.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

IOUS = np.linspace(0.5, 0.95, 10)
"""COCO's IoU thresholds."""
AREAS = {"all": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}
"""COCO's ranges of area, in square pixels, both ends included."""
MOST = 100
"""How many detections of an image and a class count, the best ones."""


@dataclass(frozen=True)
class Truth:
    """The objects of a data set.

    Attributes:
        image_ids: I of them, sorted; an image is known by its place here.
        classes: K names.
        image, label: (G,) whose they are.
        box: (G, 4) XYWH in pixels.
        area: (G,) in square pixels; of a mask where the data set has one.
        crowd: (G,) whether it stands for several objects: nothing need find it, and what lies in it is no error.
    """

    image_ids: tuple[Any, ...]
    classes: tuple[str, ...]
    image: np.ndarray
    label: np.ndarray
    box: np.ndarray
    area: np.ndarray
    crowd: np.ndarray

    @classmethod
    def from_coco(cls, content: Mapping[str, Any], category_ids: Sequence[int] = ()) -> Truth:
        """The objects in the content of a COCO annotation file.

        Args:
            content: ``images``, ``annotations`` and ``categories``.
            category_ids: of the classes in their order; by default in rising order, as Detectron2 has them.
        """
        names = {category["id"]: category["name"] for category in content["categories"]}
        label_of = {c: k for k, c in enumerate(category_ids or sorted(names))}
        image_ids = tuple(sorted({image["id"] for image in content["images"]}))
        place = {image_id: i for i, image_id in enumerate(image_ids)}
        found = [
            a
            for a in content.get("annotations", ())
            if a["category_id"] in label_of and a["image_id"] in place
        ]
        return cls(
            image_ids=image_ids,
            classes=tuple(str(names[c]) for c in label_of),
            image=np.array([place[a["image_id"]] for a in found], dtype=np.int64),
            label=np.array([label_of[a["category_id"]] for a in found], dtype=np.int64),
            box=np.array([a["bbox"] for a in found], dtype=np.float64).reshape(-1, 4),
            area=np.array([_area(a) for a in found], dtype=np.float64),
            crowd=np.array([bool(a.get("iscrowd", 0)) for a in found], dtype=bool),
        )

    def __len__(self) -> int:
        return len(self.label)

    @property
    def size(self) -> np.ndarray:
        """(G,) 0, 1, 2: small, medium, large."""
        return np.searchsorted([AREAS["small"][1], AREAS["medium"][1]], self.area, side="left")


def _area(annotation: Mapping[str, Any]) -> float:
    """Its own, else its box's."""
    _, _, width, height = annotation["bbox"]
    return annotation.get("area", width * height)


@dataclass(frozen=True)
class Detections:
    """What a detector says about a data set.

    Attributes:
        image, label: (D,) of which image of :class:`Truth`, as which class.
        box: (D, 4) XYWH in pixels.
        score: (D,).
    """

    image: np.ndarray
    label: np.ndarray
    box: np.ndarray
    score: np.ndarray

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, chosen: np.ndarray) -> Detections:
        return Detections(
            self.image[chosen], self.label[chosen], self.box[chosen], self.score[chosen]
        )


@dataclass(frozen=True)
class Matches:
    """Detections beside the objects they were matched with.

    Attributes:
        detections: those that count, class by class, in each from the best to the worst.
        starts: (K + 1,) where each class begins.
        object: (T, A, D) index of the object, or -1.
        ignored: (T, A, D) neither right nor wrong: of another size, or matched with a crowd.
        objects_ignored: (A, G) objects that need not be found: of another size, or crowds.
    """

    detections: Detections
    starts: np.ndarray
    object: np.ndarray
    ignored: np.ndarray
    objects_ignored: np.ndarray

    @cached_property
    def right(self) -> np.ndarray:
        """(T, A, D) whether a detection finds an object."""
        return (self.object >= 0) & ~self.ignored

    def found_at(self, iou: int = 0, area: int = 0) -> np.ndarray:
        """(G,) the score with which each object is found, -inf for those that are not.

        Detections are matched from the best to the worst, so an object is found by the detections above a
        threshold if and only if this score is.
        """
        scores = np.full(self.objects_ignored.shape[1], -np.inf)
        right = self.right[iou, area]
        scores[self.object[iou, area, right]] = self.detections.score[right]
        return scores


def match(truth: Truth, detections: Detections) -> Matches:
    """COCO's greedy matching of each image and class, from the best detection to the worst.

    A detection takes, among the objects that are left and overlap it enough, the one that overlaps it most, and
    an object that need not be found only where there is no other.
    """
    ranges = np.array(list(AREAS.values()))
    detections, rank = _in_order(detections, len(truth.image_ids))
    outside = (truth.area < ranges[:, :1]) | (truth.area > ranges[:, 1:])
    ignored_objects = truth.crowd | outside
    found = np.full((len(IOUS), len(ranges), len(detections)), -1, dtype=np.int32)
    taken = np.zeros((len(IOUS), len(ranges), len(truth)), dtype=bool)
    for step in _steps(truth, detections, rank, ignored_objects):
        _take(step, truth.crowd, found, taken)
    det_area = detections.box[:, 2] * detections.box[:, 3]
    det_outside = (det_area < ranges[:, :1]) | (det_area > ranges[:, 1:])
    ignored = np.broadcast_to(det_outside, found.shape).copy()
    for a in range(len(ranges)):
        matched = found[:, a] >= 0
        ignored[:, a][matched] = ignored_objects[a][found[:, a][matched]]
    starts = np.searchsorted(detections.label, np.arange(len(truth.classes) + 1))
    return Matches(detections, starts, found, ignored, ignored_objects)


def _in_order(detections: Detections, images: int) -> tuple[Detections, np.ndarray]:
    """Class by class, best first; ties as COCO breaks them, by image and by place. And each one's rank in its image."""
    order = np.lexsort((-detections.score, detections.image, detections.label))
    key = (detections.label * images + detections.image)[order]
    rank = np.arange(len(key)) - np.searchsorted(key, key)
    order, rank = order[rank < MOST], rank[rank < MOST]
    detections = detections[order]
    order = np.lexsort((rank, detections.image, -detections.score, detections.label))
    return detections[order], rank[order]


def pairs(detection_keys: np.ndarray, object_keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All (detection, object) of equal key, detection by detection, objects in their order."""
    by_key = np.argsort(object_keys, kind="stable")
    sorted_keys = object_keys[by_key]
    first = np.searchsorted(sorted_keys, detection_keys, side="left")
    count = np.searchsorted(sorted_keys, detection_keys, side="right") - first
    of = np.repeat(np.arange(len(detection_keys)), count)
    offset = np.arange(len(of)) - np.repeat(np.cumsum(count) - count, count)
    return of, by_key[np.repeat(first, count) + offset]


def overlap(ours: np.ndarray, theirs: np.ndarray, crowd: np.ndarray | None = None) -> np.ndarray:
    """IoU of XYWH boxes, row by row; of a crowd, how much of the first box lies in it."""
    corner = np.minimum(ours[:, :2] + ours[:, 2:], theirs[:, :2] + theirs[:, 2:])
    side = corner - np.maximum(ours[:, :2], theirs[:, :2])
    shared = np.where((side > 0).all(axis=1), side[:, 0] * side[:, 1], 0.0)
    own, other = (box[:, 2] * box[:, 3] for box in (ours, theirs))
    union = own + other - shared
    if crowd is not None:
        union = np.where(crowd, own, union)
    return np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0)


def overlapping(
    truth: Truth, detections: Detections, least: float, *, same_class: bool, chunk: int = 200_000
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(detection, object, IoU) of all pairs in one image that overlap by ``least`` or more.

    Args:
        truth, detections: what is paired.
        least: IoU.
        same_class: only pairs of one class.
        chunk: detections at a time, which bounds the memory.
    """
    images = len(truth.image_ids)
    ours, theirs = detections.image, truth.image
    if same_class:
        ours, theirs = ours + images * detections.label, theirs + images * truth.label
    kept = []
    for begin in range(0, len(detections), chunk):
        d, g = pairs(ours[begin : begin + chunk], theirs)
        d += begin
        iou = overlap(detections.box[d], truth.box[g], truth.crowd[g])
        enough = iou >= least
        kept.append((d[enough], g[enough], iou[enough]))
    if not kept:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    return tuple(np.concatenate(parts) for parts in zip(*kept))


@dataclass
class _Step:
    """The next detection of every image and class that has one: they cannot take each other's objects."""

    detection: np.ndarray  # (P,) of each pair, segment by segment
    object: np.ndarray  # (P,)
    iou: np.ndarray  # (P,)
    priority: np.ndarray  # (A, P), unique; the largest that is free is taken
    starts: np.ndarray  # where each detection's pairs begin


def _steps(
    truth: Truth, detections: Detections, rank: np.ndarray, ignored: np.ndarray
) -> Iterator[_Step]:
    d, g, iou = overlapping(truth, detections, IOUS[0], same_class=True)
    if not len(d):
        return
    images = len(truth.image_ids)
    group = detections.label[d] * images + detections.image[d]
    order = np.lexsort((g, rank[d], group))
    d, g, iou, group = d[order], g[order], iou[order], group[order]
    # The place of a detection among those of its group that have anything to take.
    new_detection = np.r_[True, d[1:] != d[:-1]]
    number = np.cumsum(new_detection) - 1
    place = number - number[np.searchsorted(group, group)]
    order = np.argsort(place, kind="stable")
    d, g, iou, place = d[order], g[order], iou[order], place[order]
    bounds = np.searchsorted(place, np.arange(place[-1] + 2))
    for begin, end in zip(bounds[:-1], bounds[1:]):
        at = slice(begin, end)
        priority = np.empty((len(ignored), end - begin), dtype=np.int64)
        for a, flags in enumerate(ignored):
            # What must be found before what need not; then by IoU; of equal ones the later, as in COCO's loop.
            best_last = np.lexsort((g[at], iou[at], ~flags[g[at]]))
            priority[a, best_last] = np.arange(end - begin)
        starts = np.flatnonzero(np.r_[True, d[at][1:] != d[at][:-1]])
        yield _Step(d[at], g[at], iou[at], priority, starts)


def _take(step: _Step, crowd: np.ndarray, found: np.ndarray, taken: np.ndarray) -> None:
    enough = step.iou >= np.minimum(IOUS, 1 - 1e-10)[:, None]
    free = ~taken[:, :, step.object] | crowd[step.object]
    choice = np.where(enough[:, None] & free, step.priority, -1)
    best = np.maximum.reduceat(choice, step.starts, axis=2)
    detection = step.detection[step.starts]
    for a, priority in enumerate(step.priority):
        pair_of = np.argsort(priority)
        t, column = np.nonzero(best[:, a] >= 0)
        objects = step.object[pair_of[best[t, a, column]]]
        found[t, a, detection[column]] = objects
        taken[t, a, objects] = True
