"""Classification and box regression of several detectors on the same regions or anchors.

*Two-stage detectors* classify the same proposals, those of the first detector (normally the teacher), so tables of
different students have the same rows. This favours the first detector: an object without one of its proposals has no
row. Of a cascade the first stage is used, since it was trained on proposals. *One-stage detectors* are compared on the
same anchors: those that any detector labels as foreground, and the 100 of the highest score of each detector.

The label of a region is the class of the object with the highest IoU, if that is at least 0.5, otherwise background.
The label of an anchor is assigned by the detector's own rule. The classification is correct if the predicted class,
background included, is the label. Background is predicted by a one-stage detector where no class reaches the threshold
of its highest F1, and instead of a class that the data set does not have. The box of a foreground row is correct if the
box predicted for the label's class has an IoU of at least 0.5 with the object. Background rows in a crowd, and objects
whose class some detector does not have, are ignored.

Notation: E detectors, P = E (E - 1) / 2 pairs of them, K classes of the data set, M rows (regions or anchors) of an
image, F of them foreground. Only counts are stored.
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

from ..modeling.anchors import check_anchors
from ..modeling.box_regression import select_class_deltas
from ..modeling.outputs import DenseOutputs, DetectorOutputs, RCNNOutputs, uses_sigmoid_scores
from ..structures.class_map import ClassMap
from ..utils.compat import box_tensors
from ..utils.env import config_hash
from ..utils.errors import InputError
from .detectors import LoadedDetector, input_scale
from .matching import GroundTruth

OUTCOMES = ("both", "first", "second", "neither")
SIZES = ("small", "medium", "large", "background")
NUM_TOP_ANCHORS = 100


def why_not_comparable(detectors: Sequence[LoadedDetector]) -> str | None:
    """Return the reason why the regions of these detectors cannot be compared; None if they can."""
    if len(detectors) < 2:
        return "there is one detector"
    kinds = {ready.teacher.outputs_class for ready in detectors}
    if len(kinds) > 1:
        names = [
            f"{r.detector.name} {'regions' if r.teacher.outputs_class is RCNNOutputs else 'anchors'}"
            for r in detectors
        ]
        return f"the detectors are of different families: {', '.join(names)}"
    for ready in detectors if kinds == {RCNNOutputs} else ():
        if uses_sigmoid_scores(ready.teacher.detector):
            return f"{ready.detector.name} scores each class independently (use_sigmoid_ce)"
    if kinds == {DenseOutputs}:
        first, *others = detectors
        for other in others:
            try:
                check_anchors(first.teacher.detector, other.teacher.detector)
            except InputError as error:
                return f"{other.detector.name} has other anchors ({error.found})"
            if config_hash(first.detector.mapper) != config_hash(other.detector.mapper):
                return f"{other.detector.name} has another mapper, and so other anchors"
    return None


@dataclass
class _Image:
    """The objects of an image in pixels of its file, and the scale of each detector's input."""

    size: tuple[int, int]
    boxes: Tensor  # (G, 4) XYXY
    labels: Tensor  # (G,)
    sizes: Tensor  # (G,) 0, 1, 2
    crowd: Tensor  # (G,)
    scales: list[Tensor]  # for each detector (4,), see input_scale


@dataclass
class _Rows:
    """The rows of an image and their predictions, in pixels of the image file and classes of the data set."""

    boxes: Tensor  # (M, 4)
    objects: Tensor  # (M,) index of the object of each row; -1 background
    top: list[Tensor]  # for each detector (M,), the predicted class
    refined: list[Tensor]  # for each detector (F, 4), boxes predicted for the foreground rows


class RegionCounts:
    """Counts of correct and equal predictions, accumulated image by image.

    Args:
        detectors: detectors that can be compared, see :func:`why_not_comparable`.
        truth: the ground truth.
        classes: indices of the classes that all detectors have.
        thresholds: for each detector the score threshold; two-stage detectors do not use it.
    """

    def __init__(
        self,
        detectors: Sequence[LoadedDetector],
        truth: GroundTruth,
        classes: Sequence[int],
        thresholds: Sequence[float],
    ):
        self.names = [ready.detector.name for ready in detectors]
        self.truth, self.thresholds = truth, list(thresholds)
        self.background = len(truth.classes)
        self.classes = torch.as_tensor(list(classes))
        self.columns = [
            torch.as_tensor([r.to_detector_label[k] for k in classes]) for r in detectors
        ]
        self.detector_labels = torch.full((len(detectors), self.background + 1), -1)
        for own, columns in zip(self.detector_labels, self.columns):
            own[self.classes] = columns
        self.dataset_classes = [self._to_dataset_classes(ready.class_map) for ready in detectors]
        self.pairs = list(combinations(range(len(detectors)), 2))
        self.two_stage = detectors[0].teacher.outputs_class is RCNNOutputs
        # FCOS and GFL regress from points, whose IoU before regression is undefined.
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

    def _to_dataset_classes(self, classes: ClassMap) -> Tensor:
        """Return (K' + 1,), the data set's class of each of the detector's classes and of background."""
        labels = classes.labels_to_student(torch.arange(len(classes.teacher)))
        labels = torch.cat([labels, labels.new_tensor([-1])])
        return labels.where(labels >= 0, self.background)

    def update(
        self, place: int, inputs: Sequence[dict], outputs: Sequence[DetectorOutputs]
    ) -> None:
        """Add an image.

        Args:
            place: index of the image in the ground truth.
            inputs: for each detector its input dict.
            outputs: for each detector its outputs for this image.
        """
        image = self._image(place, inputs)
        rows = (self._regions if self.two_stage else self._anchors)(image, outputs)
        is_fg = rows.objects >= 0
        label = torch.full_like(rows.objects, self.background)
        size = torch.full_like(rows.objects, 3)
        label[is_fg], size[is_fg] = (
            image.labels[rows.objects[is_fg]],
            image.sizes[rows.objects[is_fg]],
        )
        counted = torch.ones_like(is_fg)
        if image.crowd.any():
            inside = pairwise_ioa(Boxes(image.boxes[image.crowd]), Boxes(rows.boxes))
            counted = is_fg | (inside.amax(dim=0) < 0.5)
        self._add(image, rows, label, size, counted)

    def _image(self, place: int, inputs: Sequence[dict]) -> _Image:
        in_image = np.flatnonzero(self.truth.image == place)
        xywh = torch.as_tensor(self.truth.box[in_image], dtype=torch.float32)
        size = (inputs[0]["height"], inputs[0]["width"])
        return _Image(
            size,
            BoxMode.convert(xywh, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS),
            torch.as_tensor(self.truth.label[in_image]),
            torch.as_tensor(self.truth.size[in_image]),
            torch.as_tensor(self.truth.crowd[in_image]),
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
        is_fg = objects >= 0
        rows = _Rows(proposals, objects, [], [])
        for e, output in enumerate(outputs):
            device = output.detector.device
            boxes = (proposals * image.scales[e]).to(device)
            output.set_region_boxes([[Boxes(boxes)]])
            stage = output.regions[0]
            rows.top.append(self.dataset_classes[e][stage.pred_class_logits.argmax(dim=1).cpu()])
            label = self.detector_labels[e][image.labels[objects[is_fg]]].to(device)
            deltas = select_class_deltas(stage.pred_proposal_deltas[is_fg.to(device)], label)
            refined = stage.box2box_transform.apply_deltas(deltas.float(), boxes[is_fg.to(device)])
            rows.refined.append(_clipped(refined, image, e))
        return rows

    def _anchors(self, image: _Image, outputs: Sequence[DetectorOutputs]) -> _Rows:
        anchors = Boxes.cat(outputs[0].anchors).tensor.cpu() / image.scales[0]
        scores = [self._scores(output) for output in outputs]
        objects = torch.full((len(anchors),), -1)
        for e, output in reversed(list(enumerate(outputs))):  # the first one takes precedence
            assigned = self._assigned_objects(image, e, output)
            objects = torch.where(assigned >= 0, assigned, objects)
        chosen = objects >= 0
        for score, columns in zip(scores, self.columns):
            best = score[:, columns].amax(dim=1)
            chosen[best.topk(min(NUM_TOP_ANCHORS, len(best))).indices] = True
        kept = torch.nonzero(chosen & self._known(image, objects))[:, 0]
        rows = _Rows(anchors[kept], objects[kept], [], [])
        fg = kept[rows.objects >= 0]
        for e, output in enumerate(outputs):
            best, which = scores[e][kept].max(dim=1)
            predicted = self.dataset_classes[e][which]
            rows.top.append(torch.where(best >= self.thresholds[e], predicted, self.background))
            deltas = torch.cat(output.pred_anchor_deltas, dim=1)[0].float().cpu()[fg]
            own = Boxes.cat(output.anchors).tensor.cpu()[fg]
            refined = output.detector.box2box_transform.apply_deltas(deltas, own)
            rows.refined.append(_clipped(refined, image, e))
        return rows

    @staticmethod
    def _scores(output: DetectorOutputs) -> Tensor:
        """Return (anchors, K'), the detector's scores at inference."""
        score = torch.cat(output.pred_logits, dim=1)[0].float().sigmoid().cpu()
        if len(output.predictions) > 2:
            centerness = torch.cat(output.pred_centerness, dim=1)[0].float().sigmoid().cpu()
            score = (score * centerness).sqrt()
        return score

    @staticmethod
    def _assigned_objects(image: _Image, e: int, output: DetectorOutputs) -> Tensor:
        """Return (anchors,), the object assigned to each anchor by the detector's own rule, -1 for none."""
        single = torch.nonzero(~image.crowd)[:, 0]
        anchors, detector = output.anchors, output.detector
        if not len(single):
            return torch.full((sum(map(len, anchors)),), -1)
        given = Instances(tuple(output.images.image_sizes[0]))
        given.gt_boxes = Boxes((image.boxes[single] * image.scales[e]).to(detector.device))
        # Any class will do; with an incremental class map the last one is a new class, which is labelled.
        label = detector.num_classes - 1
        given.gt_classes = torch.full((len(single),), label, device=detector.device)
        [labels], [matched] = detector.label_anchors(anchors, [given])
        fg = torch.nonzero(labels == label)[:, 0]
        boxes = box_tensors([matched])[0][fg]
        # label_anchors returns the matched boxes, not their indices.
        equal = (boxes[:, None] == given.gt_boxes.tensor[None]).all(dim=2)
        objects = torch.full(labels.shape, -1)
        objects[fg.cpu()] = single[equal.int().argmax(dim=1).cpu()]
        return objects

    def _known(self, image: _Image, objects: Tensor) -> Tensor:
        """Return whether a row is background, or all detectors have the class of its object."""
        known = torch.ones_like(objects, dtype=torch.bool)
        is_fg = objects >= 0
        known[is_fg] = torch.isin(image.labels[objects[is_fg]], self.classes)
        return known

    def _add(self, image: _Image, rows: _Rows, label, size, counted) -> None:
        is_fg = rows.objects >= 0
        cell = (label * 4 + size).numpy()
        kept, kept_fg = counted.numpy(), counted[is_fg].numpy()
        fg_cell = cell[is_fg.numpy()][kept_fg]
        truth = image.boxes[rows.objects[is_fg]]
        _add(self.counts["rows"], cell[kept])
        before = _iou(rows.boxes[is_fg], truth)
        _add(self.counts["iou_before"], fg_cell, before[kept_fg])
        after = [_iou(refined, truth)[kept_fg] for refined in rows.refined]
        right = [(top == label).numpy() for top in rows.top]
        for e, iou in enumerate(after):
            _add(self.counts["iou_after"][e], fg_cell, iou)
        for p, (i, j) in enumerate(self.pairs):
            equal = (rows.top[i] == rows.top[j]).numpy()
            _add(self.counts["agree"][p], cell[kept & equal])
            _add(self.counts["class"][p], (cell * 4 + _outcome(right[i], right[j]))[kept])
            outcome = _outcome(after[i] >= 0.5, after[j] >= 0.5)
            _add(self.counts["box"][p], fg_cell * 4 + outcome)

    def summarize(self) -> dict[str, Any]:
        """Return the results of each detector and each pair, by class and by size, as plain Python data."""
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
                    "class_right": _fraction(right.sum(), rows.sum()),
                    "class_right_foreground": _fraction(right[:-1].sum(), foreground),
                    "box_right": _fraction(boxes, foreground),
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
            return {"rows": rows, **four, "agreement": _fraction(counts["agree"][at].sum(), rows)}

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
    """Return (F,), the IoU of each box with its object; 0 where both are empty."""
    return matched_pairwise_iou(Boxes(boxes), Boxes(truth)).nan_to_num().numpy()


def _outcome(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return (M,), indices in :data:`OUTCOMES`, from whether each of two detectors is correct."""
    first, second = first.astype(int), second.astype(int)
    return 3 - 2 * first - second


def _fraction(count: float, total: float) -> float | None:
    return float(count / total) if total else None


def _clipped(boxes: Tensor, image: _Image, e: int) -> Tensor:
    """Scale boxes to pixels of the image file and clip them to the image."""
    boxes = Boxes(boxes.cpu() / image.scales[e])
    boxes.clip(image.size)
    return boxes.tensor
