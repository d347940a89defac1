"""Region by region: who is right about the same boxes, in class and in box.

Two-stage detectors judge the same proposals, those of the first detector (normally the teacher): its list is the same
whichever students are compared, so tables of different students have the same rows. It favours the first detector, in
that objects none of its proposals lies on have no row. Of a cascade the first stage judges, which was trained on
proposals. One-stage detectors judge the same anchors: those labelled foreground for any of them, by its own rule, and
each one's 100 best. Nothing is kept but counts.

Right in class: the top of all the detector's classes, background included, is the label; one that the data set lacks
says background, as it gives no detection. A region has the class of the object it overlaps by 0.5 or more, an anchor
that of the object it was labelled with. A one-stage detector says background where no class reaches the score at
which its F1 is best. Right in box, of foreground rows: the box of the label's class overlaps the object
by 0.5 or more. Background rows that lie in a crowd, and rows of objects whose class not all detectors know, do not
count.

Letters: E detectors, P = E (E - 1) / 2 pairs of them, K classes of the data set, M rows of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, BoxMode, Instances, pairwise_ioa, pairwise_iou
from detectron2.structures.boxes import matched_pairwise_iou
from torch import Tensor

from ..losses.base import check_anchors
from ..losses.tar import of_class
from ..modeling.outputs import DenseOutputs, DetectorOutputs, RCNNOutputs, scores_by_sigmoid
from ..structures.class_map import ClassMap
from ..utils.compat import box_tensors
from ..utils.env import config_hash
from ..utils.errors import InputError
from .detectors import Ready, input_scale
from .matching import Truth

OUTCOMES = ("both", "first", "second", "neither")
SIZES = ("small", "medium", "large", "background")
BEST = 100


def why_not(detectors: Sequence[Ready]) -> str | None:
    """Why these detectors cannot be compared region by region; None if they can."""
    if len(detectors) < 2:
        return "there is one detector"
    kinds = {ready.teacher.kind for ready in detectors}
    if len(kinds) > 1:
        names = [
            f"{r.detector.name} {'regions' if r.teacher.kind is RCNNOutputs else 'anchors'}"
            for r in detectors
        ]
        return f"the detectors are of different families: {', '.join(names)}"
    for ready in detectors if kinds == {RCNNOutputs} else ():
        if scores_by_sigmoid(ready.teacher.detector):
            return f"{ready.detector.name} scores each class by itself (use_sigmoid_ce)"
    if kinds == {DenseOutputs}:
        first, *others = detectors
        for other in others:
            try:
                check_anchors(first.teacher.detector, other.teacher.detector)
            except InputError as error:
                return f"{other.detector.name} has other anchors ({error.found})"
            if config_hash(first.detector.mapper) != config_hash(other.detector.mapper):
                return f"{other.detector.name} reads images otherwise, and so has other anchors"
    return None


@dataclass
class _Image:
    """An image's objects in the data set's pixels, and how much larger each detector sees it."""

    size: tuple[int, int]
    boxes: Tensor  # (G, 4) XYXY
    labels: Tensor  # (G,)
    sizes: Tensor  # (G,) 0, 1, 2
    crowd: Tensor  # (G,)
    scales: list[Tensor]  # of each detector (4,)


@dataclass
class _Rows:
    """What the detectors say of the rows of an image, all in the data set's pixels and classes."""

    boxes: Tensor  # (M, 4)
    objects: Tensor  # (M,) which object a row is labelled with; -1 background
    top: list[Tensor]  # of each detector (M,)
    refined: list[Tensor]  # of each detector (F, 4), of the foreground rows in their order


class RegionCounts:
    """Streaming counts over the images of a data set.

    Args:
        detectors: of one family, see :func:`why_not`.
        truth: the objects.
        classes: the data set's classes that all detectors know.
        thresholds: of each one-stage detector the score from which it says a class.
    """

    def __init__(
        self,
        detectors: Sequence[Ready],
        truth: Truth,
        classes: Sequence[int],
        thresholds: Sequence[float],
    ):
        self.names = [ready.detector.name for ready in detectors]
        self.truth, self.thresholds = truth, list(thresholds)
        self.background = len(truth.classes)
        self.classes = torch.as_tensor(list(classes))
        self.columns = [torch.as_tensor([r.label_to_own[k] for k in classes]) for r in detectors]
        self.own = torch.full((len(detectors), self.background + 1), -1)
        for own, columns in zip(self.own, self.columns):
            own[self.classes] = columns
        self.said = [self._said(ready.map) for ready in detectors]
        self.pairs = list(combinations(range(len(detectors)), 2))
        self.two_stage = detectors[0].teacher.kind is RCNNOutputs
        # FCOS and GFL start from points, which overlap nothing by themselves.
        self.starts_from_boxes = self.two_stage or isinstance(
            detectors[0].teacher.detector.box2box_transform, Box2BoxTransform
        )
        cells, p, e = (self.background + 1, 4), len(self.pairs), len(detectors)
        self.counts: dict[str, np.ndarray] = {
            "rows": np.zeros(cells),
            "class": np.zeros((p, *cells, 4)),
            "box": np.zeros((p, *cells, 4)),
            "agree": np.zeros((p, *cells)),
            "iou_before": np.zeros(cells),
            "iou_after": np.zeros((e, *cells)),
        }

    def _said(self, classes: ClassMap) -> Tensor:
        """(K' + 1,) which of the data set's classes each of a detector's own, and its background, stands for."""
        said = classes.student_labels(torch.arange(len(classes.teacher)))
        said = torch.cat([said, said.new_tensor([-1])])
        return said.where(said >= 0, self.background)

    def see(self, place: int, inputs: Sequence[dict], outputs: Sequence[DetectorOutputs]) -> None:
        """Add an image.

        Args:
            place: in the truth.
            inputs: for each detector what it was given of the image.
            outputs: of each, of this image alone.
        """
        image = self._image(place, inputs)
        rows = (self._regions if self.two_stage else self._anchors)(image, outputs)
        on = rows.objects >= 0
        label = torch.full_like(rows.objects, self.background)
        size = torch.full_like(rows.objects, 3)
        label[on], size[on] = image.labels[rows.objects[on]], image.sizes[rows.objects[on]]
        counted = torch.ones_like(on)
        if image.crowd.any():
            inside = pairwise_ioa(Boxes(image.boxes[image.crowd]), Boxes(rows.boxes))
            counted = on | (inside.amax(dim=0) < 0.5)
        self._add(image, rows, label, size, counted)

    def _image(self, place: int, inputs: Sequence[dict]) -> _Image:
        mine = np.flatnonzero(self.truth.image == place)
        xywh = torch.as_tensor(self.truth.box[mine], dtype=torch.float32)
        size = (inputs[0]["height"], inputs[0]["width"])
        return _Image(
            size,
            BoxMode.convert(xywh, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS),
            torch.as_tensor(self.truth.label[mine]),
            torch.as_tensor(self.truth.size[mine]),
            torch.as_tensor(self.truth.crowd[mine]),
            [input_scale(given) for given in inputs],
        )

    def _regions(self, image: _Image, outputs: Sequence[DetectorOutputs]) -> _Rows:
        proposals = outputs[0].proposals[0].proposal_boxes.tensor.cpu() / image.scales[0]
        single = torch.nonzero(~image.crowd)[:, 0]
        objects = torch.full((len(proposals),), -1)
        if len(single) and len(proposals):
            iou, nearest = pairwise_iou(Boxes(image.boxes[single]), Boxes(proposals)).max(dim=0)
            objects = torch.where(iou >= 0.5, single[nearest], -1)
        kept = self._known(image, objects)
        proposals, objects = proposals[kept], objects[kept]
        on = objects >= 0
        rows = _Rows(proposals, objects, [], [])
        for e, said in enumerate(outputs):
            device = said.detector.device
            boxes = (proposals * image.scales[e]).to(device)
            said.share({"region_boxes": [[Boxes(boxes)]]})
            stage = said.regions[0]
            rows.top.append(self.said[e][stage.pred_class_logits.argmax(dim=1).cpu()])
            wanted = self.own[e][image.labels[objects[on]]].to(device)
            deltas = of_class(stage.pred_proposal_deltas[on.to(device)], wanted)
            refined = stage.box2box_transform.apply_deltas(deltas.float(), boxes[on.to(device)])
            rows.refined.append(_clipped(refined, image, e))
        return rows

    def _anchors(self, image: _Image, outputs: Sequence[DetectorOutputs]) -> _Rows:
        anchors = Boxes.cat(outputs[0].anchors).tensor.cpu() / image.scales[0]
        scores = [self._scores(said) for said in outputs]
        objects = torch.full((len(anchors),), -1)
        for e, said in reversed(list(enumerate(outputs))):  # the first detector has the last word
            of_its = self._labelled(image, e, said)
            objects = torch.where(of_its >= 0, of_its, objects)
        chosen = objects >= 0
        for score, columns in zip(scores, self.columns):
            best = score[:, columns].amax(dim=1)
            chosen[best.topk(min(BEST, len(best))).indices] = True
        kept = torch.nonzero(chosen & self._known(image, objects))[:, 0]
        rows = _Rows(anchors[kept], objects[kept], [], [])
        on = kept[rows.objects >= 0]
        for e, said in enumerate(outputs):
            best, which = scores[e][kept].max(dim=1)
            said_class = self.said[e][which]
            rows.top.append(torch.where(best >= self.thresholds[e], said_class, self.background))
            deltas = torch.cat(said.pred_anchor_deltas, dim=1)[0].float().cpu()[on]
            own = Boxes.cat(said.anchors).tensor.cpu()[on]
            refined = said.detector.box2box_transform.apply_deltas(deltas, own)
            rows.refined.append(_clipped(refined, image, e))
        return rows

    @staticmethod
    def _scores(said: DetectorOutputs) -> Tensor:
        """(anchors, K') as the detector scores its detections."""
        score = torch.cat(said.pred_logits, dim=1)[0].float().sigmoid().cpu()
        if len(said.predictions) > 2:
            centerness = torch.cat(said.pred_centerness, dim=1)[0].float().sigmoid().cpu()
            score = (score * centerness).sqrt()
        return score

    @staticmethod
    def _labelled(image: _Image, e: int, said: DetectorOutputs) -> Tensor:
        """(anchors,) the object that each is labelled with by the detector's own rule, -1 for none."""
        single = torch.nonzero(~image.crowd)[:, 0]
        anchors, detector = said.anchors, said.detector
        if not len(single):
            return torch.full((sum(map(len, anchors)),), -1)
        given = Instances(tuple(said.images.image_sizes[0]))
        given.gt_boxes = Boxes((image.boxes[single] * image.scales[e]).to(detector.device))
        # Which of its classes does not matter, but the last is a new one where some are old.
        label = detector.num_classes - 1
        given.gt_classes = torch.full((len(single),), label, device=detector.device)
        [labels], [matched] = detector.label_anchors(anchors, [given])
        on = torch.nonzero(labels == label)[:, 0]
        boxes = box_tensors([matched])[0][on]
        # Labelling tells the box, not its number.
        equal = (boxes[:, None] == given.gt_boxes.tensor[None]).all(dim=2)
        objects = torch.full(labels.shape, -1)
        objects[on.cpu()] = single[equal.int().argmax(dim=1).cpu()]
        return objects

    def _known(self, image: _Image, objects: Tensor) -> Tensor:
        """Rows of the background, or of an object whose class all detectors know."""
        known = torch.ones_like(objects, dtype=torch.bool)
        on = objects >= 0
        known[on] = torch.isin(image.labels[objects[on]], self.classes)
        return known

    def _add(self, image: _Image, rows: _Rows, label, size, counted) -> None:
        on = rows.objects >= 0
        cell = (label * 4 + size).numpy()
        kept, kept_on = counted.numpy(), counted[on].numpy()
        on_cell = cell[on.numpy()][kept_on]
        truth = image.boxes[rows.objects[on]]
        _add(self.counts["rows"], cell[kept])
        before = _iou(rows.boxes[on], truth)
        _add(self.counts["iou_before"], on_cell, before[kept_on])
        after = [_iou(refined, truth)[kept_on] for refined in rows.refined]
        right = [(top == label).numpy() for top in rows.top]
        for e, iou in enumerate(after):
            _add(self.counts["iou_after"][e], on_cell, iou)
        for p, (i, j) in enumerate(self.pairs):
            agreed = (rows.top[i] == rows.top[j]).numpy()
            _add(self.counts["agree"][p], cell[kept & agreed])
            _add(self.counts["class"][p], (cell * 4 + _outcome(right[i], right[j]))[kept])
            outcome = _outcome(after[i] >= 0.5, after[j] >= 0.5)
            _add(self.counts["box"][p], on_cell * 4 + outcome)

    def table(self) -> dict[str, Any]:
        """The counts as plain data: how many rows, each detector's, each pair's, by class and by size."""
        rows = self.counts["rows"]
        foreground = rows[:-1].sum()
        of_pair = {e: (p, (1, 2)[pair.index(e)]) for p, pair in enumerate(self.pairs) for e in pair}
        detectors = []
        for e, name in enumerate(self.names):
            p, alone = of_pair[e]
            after = self.counts["iou_after"][e].sum() / foreground if foreground else None
            before = self.counts["iou_before"].sum() / foreground if foreground else None
            if not self.starts_from_boxes:
                before = None
            right = self.counts["class"][p][..., [0, alone]]
            boxes = self.counts["box"][p][..., [0, alone]].sum()
            detectors.append(
                {
                    "name": name,
                    "class_right": _share(right.sum(), rows.sum()),
                    "class_right_foreground": _share(right[:-1].sum(), foreground),
                    "box_right": _share(boxes, foreground),
                    "iou_before": before,
                    "iou_after": after,
                    "iou_gained": None if None in (before, after) else after - before,
                }
            )
        return {
            "kind": "regions" if self.two_stage else "anchors",
            "of": self.names[0],
            "rows": int(rows.sum()),
            "foreground": int(foreground),
            "detectors": detectors,
            "pairs": [self._pair(p) for p in range(len(self.pairs))],
        }

    def _pair(self, p: int) -> dict[str, Any]:
        counts = {name: self.counts[name][p] for name in ("class", "box", "agree")}
        counts["rows"] = self.counts["rows"]

        def part(at: Any) -> dict[str, Any]:
            rows = int(counts["rows"][at].sum())
            four = {
                name: dict(
                    zip(OUTCOMES, counts[name][at].reshape(-1, 4).sum(axis=0).astype(int).tolist())
                )
                for name in ("class", "box")
            }
            return {"rows": rows, **four, "agreement": _share(counts["agree"][at].sum(), rows)}

        first, second = (self.names[e] for e in self.pairs[p])
        names = [*self.truth.classes, "background"]
        return {
            "first": first,
            "second": second,
            "all": part(slice(None)),
            "foreground": part(slice(0, -1)),
            "background": part(slice(-1, None)),
            "by_class": {
                name: part(k) for k, name in enumerate(names[:-1]) if counts["rows"][k].sum()
            },
            "by_size": {size: part((slice(0, -1), s)) for s, size in enumerate(SIZES[:-1])},
        }


def _add(counts: np.ndarray, cells: np.ndarray, weights: np.ndarray | None = None) -> None:
    counts += np.bincount(cells, weights, minlength=counts.size).reshape(counts.shape)


def _iou(boxes: Tensor, truth: Tensor) -> np.ndarray:
    """(R,) IoU of row r with row r; 0 where both are empty."""
    return matched_pairwise_iou(Boxes(boxes), Boxes(truth)).nan_to_num().numpy()


def _outcome(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(M,) index in :data:`OUTCOMES` of two detectors, right or wrong."""
    first, second = first.astype(int), second.astype(int)
    return 3 - 2 * first - second


def _share(count: float, total: float) -> float | None:
    return float(count / total) if total else None


def _clipped(boxes: Tensor, image: _Image, e: int) -> Tensor:
    """A detector's boxes in the data set's pixels, cut at the image's border."""
    boxes = Boxes(boxes.cpu() / image.scales[e])
    boxes.clip(image.size)
    return boxes.tensor
