"""COCO's matching of detections and ground-truth objects, for all images, IoU thresholds and area ranges at once.

The results equal those of ``pycocotools.cocoeval.COCOeval`` exactly. Accuracy, error types, and objects won and lost are
all computed from them.

Notation: I images, K classes, G objects, D detections, T IoU thresholds, A area ranges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

IOUS = np.linspace(0.5, 0.95, 10)
"""COCO's IoU thresholds."""
AREAS = {"all": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}
"""COCO's area ranges in square pixels, both ends included."""
MAX_DETS = 100
"""Maximum number of detections per image and class, those of the highest score."""


@dataclass(frozen=True)
class GroundTruth:
    """The ground-truth objects of a data set.

    Attributes:
        image_ids: the I sorted image ids. Elsewhere an image is given by its index here.
        classes: the K class names.
        image, label: (G,) index of the image and of the class.
        box: (G, 4) XYWH in pixels.
        area: (G,) in square pixels, of the mask if the data set has masks.
        crowd: (G,) COCO's ``iscrowd``. A crowd need not be detected, and detections in it are ignored.
    """

    image_ids: tuple[Any, ...]
    classes: tuple[str, ...]
    image: np.ndarray
    label: np.ndarray
    box: np.ndarray
    area: np.ndarray
    crowd: np.ndarray

    @classmethod
    def from_coco(cls, content: Mapping[str, Any], category_ids: Sequence[int] = ()) -> GroundTruth:
        """Read the objects from the content of a COCO annotation file.

        Args:
            content: dict with ``images``, ``annotations`` and ``categories``.
            category_ids: category id of each class. Default: the sorted ids, as in Detectron2.
        """
        names = {category["id"]: category["name"] for category in content["categories"]}
        label_of = {c: k for k, c in enumerate(category_ids or sorted(names))}
        image_ids = tuple(sorted({image["id"] for image in content["images"]}))
        place = {image_id: i for i, image_id in enumerate(image_ids)}
        found = counted_annotations(content, category_ids)
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
        """(G,) size of each object: 0 small, 1 medium, 2 large."""
        return np.searchsorted([AREAS["small"][1], AREAS["medium"][1]], self.area, side="left")


def counted_annotations(
    content: Mapping[str, Any], category_ids: Sequence[int] = ()
) -> list[Mapping[str, Any]]:
    """Return the annotations that are the objects of :meth:`GroundTruth.from_coco`, in its order."""
    known = set(category_ids or (category["id"] for category in content["categories"]))
    images = {image["id"] for image in content["images"]}
    return [
        a
        for a in content.get("annotations", ())
        if a["category_id"] in known and a["image_id"] in images
    ]


def _area(annotation: Mapping[str, Any]) -> float:
    """Return the annotated area, otherwise the area of the box."""
    _, _, width, height = annotation["bbox"]
    return annotation.get("area", width * height)


@dataclass(frozen=True)
class Detections:
    """The detections of a detector on a data set.

    Attributes:
        image, label: (D,) index of the image in :class:`GroundTruth`, and of the predicted class.
        box: (D, 4) XYWH in pixels.
        score: (D,).
        mask: (D,) compressed RLE as of :func:`d2kd.structures.rle.to_rle`; None if the detector has no masks.
    """

    image: np.ndarray
    label: np.ndarray
    box: np.ndarray
    score: np.ndarray
    mask: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, chosen: np.ndarray) -> Detections:
        return Detections(
            self.image[chosen],
            self.label[chosen],
            self.box[chosen],
            self.score[chosen],
            None if self.mask is None else self.mask[chosen],
        )


@dataclass(frozen=True)
class Matches:
    """Detections and the objects they are matched with.

    Attributes:
        detections: at most :data:`MAX_DETS` per image and class, sorted by class, then by descending score.
        starts: (K + 1,) index of the first detection of each class.
        object: (T, A, D) index of the matched object, or -1.
        ignored: (T, A, D) whether a detection is neither a true nor a false positive: it is outside the area range
            and unmatched, or matched with an ignored object.
        objects_ignored: (A, G) objects that need not be detected: crowds, and those outside the area range.
    """

    detections: Detections
    starts: np.ndarray
    object: np.ndarray
    ignored: np.ndarray
    objects_ignored: np.ndarray

    @cached_property
    def is_tp(self) -> np.ndarray:
        """(T, A, D) whether a detection is a true positive."""
        return (self.object >= 0) & ~self.ignored

    def found_at(self, iou: int = 0, area: int = 0) -> np.ndarray:
        """Return (G,), the score of the detection matched with each object, -inf if there is none.

        Matching is greedy by descending score. So the detections above a score threshold find an object if and only
        if this score is above the threshold.
        """
        scores = np.full(self.objects_ignored.shape[1], -np.inf)
        is_tp = self.is_tp[iou, area]
        scores[self.object[iou, area, is_tp]] = self.detections.score[is_tp]
        return scores


def match_detections(
    truth: GroundTruth, detections: Detections, masks: np.ndarray | None = None
) -> Matches:
    """Match detections and objects greedily by descending score, in each image and class, as COCO does.

    Overlaps are those of boxes or, with the objects' ``masks`` (G,) as RLE, those of masks.

    A detection is matched with the unmatched object of the highest IoU, if that reaches the threshold. It is matched
    with an ignored object only if there is no other.
    """
    ranges = np.array(list(AREAS.values()))
    detections, rank = _in_order(detections, len(truth.image_ids))
    outside = (truth.area < ranges[:, :1]) | (truth.area > ranges[:, 1:])
    ignored_objects = truth.crowd | outside
    found = np.full((len(IOUS), len(ranges), len(detections)), -1, dtype=np.int32)
    used = np.zeros((len(IOUS), len(ranges), len(truth)), dtype=bool)
    for candidates in _rounds(truth, detections, rank, ignored_objects, masks):
        _assign(candidates, truth.crowd, found, used)
    det_area = detections.box[:, 2] * detections.box[:, 3]
    if masks is not None:
        # One by one: pycocotools fails for more than 255 together.
        det_area = np.array([mask_util.area(mask) for mask in detections.mask], dtype=float)
    det_outside = (det_area < ranges[:, :1]) | (det_area > ranges[:, 1:])
    ignored = np.broadcast_to(det_outside, found.shape).copy()
    for a in range(len(ranges)):
        matched = found[:, a] >= 0
        ignored[:, a][matched] = ignored_objects[a][found[:, a][matched]]
    starts = np.searchsorted(detections.label, np.arange(len(truth.classes) + 1))
    return Matches(detections, starts, found, ignored, ignored_objects)


def _in_order(detections: Detections, images: int) -> tuple[Detections, np.ndarray]:
    """Sort by class, then by descending score, with ties as in COCO; return also each detection's rank in its image."""
    order = np.lexsort((-detections.score, detections.image, detections.label))
    key = (detections.label * images + detections.image)[order]
    rank = np.arange(len(key)) - np.searchsorted(key, key)
    order, rank = order[rank < MAX_DETS], rank[rank < MAX_DETS]
    detections = detections[order]
    order = np.lexsort((rank, detections.image, -detections.score, detections.label))
    return detections[order], rank[order]


def equal_key_pairs(
    detection_keys: np.ndarray, object_keys: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices (detection, object) of all pairs of equal keys, sorted by detection, then by object."""
    by_key = np.argsort(object_keys, kind="stable")
    sorted_keys = object_keys[by_key]
    first = np.searchsorted(sorted_keys, detection_keys, side="left")
    count = np.searchsorted(sorted_keys, detection_keys, side="right") - first
    of = np.repeat(np.arange(len(detection_keys)), count)
    offset = np.arange(len(of)) - np.repeat(np.cumsum(count) - count, count)
    return of, by_key[np.repeat(first, count) + offset]


def rowwise_iou(a: np.ndarray, b: np.ndarray, crowd: np.ndarray | None = None) -> np.ndarray:
    """Compute the IoU of XYWH boxes (R, 4) row by row; where b is a crowd, intersection over the area of a."""
    corner = np.minimum(a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:])
    side = corner - np.maximum(a[:, :2], b[:, :2])
    intersection = np.where((side > 0).all(axis=1), side[:, 0] * side[:, 1], 0.0)
    area_a, area_b = (box[:, 2] * box[:, 3] for box in (a, b))
    union = area_a + area_b - intersection
    if crowd is not None:
        union = np.where(crowd, area_a, union)
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=intersection > 0)


def overlapping_pairs(
    truth: GroundTruth,
    detections: Detections,
    least: float,
    *,
    same_class: bool,
    chunk: int = 200_000,
    masks: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (detection, object, IoU) of all pairs in the same image with an IoU of at least ``least``.

    Args:
        truth, detections: objects and detections to pair.
        least: minimum IoU.
        same_class: whether to return only pairs of the same class.
        chunk: number of detections processed at a time, to limit the memory.
        masks: RLE of each object, for the IoU of masks.
    """
    images = len(truth.image_ids)
    det_keys, gt_keys = detections.image, truth.image
    if same_class:
        det_keys, gt_keys = det_keys + images * detections.label, gt_keys + images * truth.label
    kept = []
    for begin in range(0, len(detections), chunk):
        d, g = equal_key_pairs(det_keys[begin : begin + chunk], gt_keys)
        d += begin
        if masks is None:
            iou = rowwise_iou(detections.box[d], truth.box[g], truth.crowd[g])
        else:
            iou = _mask_iou(detections.mask, masks, truth.crowd, d, g)
        enough = iou >= least
        kept.append((d[enough], g[enough], iou[enough]))
    if not kept:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    return tuple(np.concatenate(parts) for parts in zip(*kept))


def _mask_iou(
    detected: np.ndarray, masks: np.ndarray, crowd: np.ndarray, d: np.ndarray, g: np.ndarray
) -> np.ndarray:
    """Return the IoU of the masks of each pair, of which those of a detection follow each other."""
    iou = np.zeros(len(d))
    starts = np.flatnonzero(np.r_[True, d[1:] != d[:-1]]) if len(d) else d
    for begin, end in zip(starts, np.r_[starts[1:], len(d)]):
        objects = g[begin:end]
        iou[begin:end] = mask_util.iou(
            [detected[d[begin]]], list(masks[objects]), crowd[objects].astype(np.uint8).tolist()
        )[0]
    return iou


@dataclass
class _Round:
    """The candidate pairs of one detection per image and class. These detections have no object in common."""

    detection: np.ndarray  # (P,) sorted
    object: np.ndarray  # (P,)
    iou: np.ndarray  # (P,)
    priority: np.ndarray  # (A, P), unique; the unmatched object of the highest priority is matched
    starts: np.ndarray  # index of each detection's first pair


def _rounds(
    truth: GroundTruth,
    detections: Detections,
    rank: np.ndarray,
    ignored: np.ndarray,
    masks: np.ndarray | None,
) -> Iterator[_Round]:
    d, g, iou = overlapping_pairs(truth, detections, IOUS[0], same_class=True, masks=masks)
    if not len(d):
        return
    images = len(truth.image_ids)
    group = detections.label[d] * images + detections.image[d]
    order = np.lexsort((g, rank[d], group))
    d, g, iou, group = d[order], g[order], iou[order], group[order]
    # The rank of a detection among those of its group that have candidates.
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
            # Objects that are not ignored first, then by IoU; of equal IoU the later one, as in COCO's loop.
            best_last = np.lexsort((g[at], iou[at], ~flags[g[at]]))
            priority[a, best_last] = np.arange(end - begin)
        starts = np.flatnonzero(np.r_[True, d[at][1:] != d[at][:-1]])
        yield _Round(d[at], g[at], iou[at], priority, starts)


def _assign(candidates: _Round, crowd: np.ndarray, found: np.ndarray, used: np.ndarray) -> None:
    enough = candidates.iou >= np.minimum(IOUS, 1 - 1e-10)[:, None]
    available = ~used[:, :, candidates.object] | crowd[candidates.object]
    choice = np.where(enough[:, None] & available, candidates.priority, -1)
    best = np.maximum.reduceat(choice, candidates.starts, axis=2)
    detection = candidates.detection[candidates.starts]
    for a, priority in enumerate(candidates.priority):
        pair_of = np.argsort(priority)
        t, column = np.nonzero(best[:, a] >= 0)
        objects = candidates.object[pair_of[best[t, a, column]]]
        found[t, a, detection[column]] = objects
        used[t, a, objects] = True
