"""Outputs of two-stage detectors: proposals, and regions of RoI heads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor, nn

from .base import DetectorOutputs, Maps, Unreadable, asked
from .capture import Call


@dataclass
class Regions:
    """What one stage of RoI heads said about its regions; row r belongs to box r.

    Attributes:
        boxes: a ``Boxes`` for each image, XYXY in absolute pixels; R boxes together.
        box_features: ``(R, D)``, what the box predictor saw.
        pred_class_logits: ``(R, K + 1)``, background last.
        pred_proposal_deltas: ``(R, 4K)``, or ``(R, 4)`` if class-agnostic.
        box2box_transform: the coder of the deltas.
        gt_classes: ``(R,)`` in ``[0, K]``, K background; None where nobody labelled the boxes.
        gt_boxes: ``(R, 4)`` matched ground truth; in an image without any, the boxes themselves.
    """

    boxes: list[Boxes]
    box_features: Tensor
    pred_class_logits: Tensor
    pred_proposal_deltas: Tensor
    box2box_transform: Box2BoxTransform
    gt_classes: Tensor | None = None
    gt_boxes: Tensor | None = None

    @property
    def box_tensor(self) -> Tensor:
        """All boxes, ``(R, 4)``."""
        return Boxes.cat(self.boxes).tensor


def box_stages(roi_heads: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Box head and box predictor of each stage: one of ``StandardROIHeads``, several of a cascade."""
    heads, predictors = roi_heads.box_head, roi_heads.box_predictor
    if isinstance(predictors, nn.ModuleList):
        return list(zip(heads, predictors, strict=True))
    return [(heads, predictors)]


def scores_by_sigmoid(detector: nn.Module) -> bool:
    """Whether a class of an R-CNN's region is scored by itself (``use_sigmoid_ce``, after Detectron2 0.6).

    The last logit, of the background, then means nothing, and a softmax of them is no score.
    """
    stages = box_stages(detector.roi_heads)
    return any(getattr(predictor, "use_sigmoid_ce", False) for _, predictor in stages)


class RCNNOutputs(DetectorOutputs):
    """What a ``GeneralizedRCNN`` on an FPN says: Faster and Mask R-CNN, and Cascade R-CNN with more stages."""

    region_boxes: list[list[Boxes]] | None = None
    """For each stage the regions' boxes by image: the student's own, and the ones a teacher is asked about."""

    predictor_calls: list[Call] | None = None
    """The calls of a student's box predictors while it trained, one for each stage."""

    @classmethod
    def joints(cls, detector: nn.Module) -> dict[str, nn.Module | Callable]:
        heads = detector.roi_heads
        joints = {
            "backbone": detector.backbone,
            "roi_heads": heads,
            "box_pooler": heads.box_pooler,
        }
        for stage, (_, predictor) in enumerate(box_stages(heads)):
            joints[f"box_predictor.{stage}"] = predictor
        return joints

    @staticmethod
    def _captured(calls: dict[str, list[Call]]) -> dict[str, Any]:
        ((_, features),) = calls["backbone"]
        ((inputs, (proposals, _)),) = calls["roi_heads"]
        # The pooler's inputs and not the proposals: later stages of a cascade pool other boxes, and with
        # train_on_pred_boxes the proposals change afterwards.
        boxes = [list(pooled) for (_, pooled), _ in calls["box_pooler"]]
        captured = {
            "features": Maps(features),
            "proposals": proposals,
            "region_boxes": boxes,
            "predictor_calls": [calls[f"box_predictor.{stage}"][0] for stage in range(len(boxes))],
        }
        if len(inputs) > 3:  # heads of another's own may be given them by name
            captured["gt_instances"] = inputs[3]
        return captured

    def _captured_regions(self) -> list[Regions]:
        """The student's own, with the labels that its loss gave them."""
        heads, regions = self.detector.roi_heads, []
        for stage, ((_, predictor), boxes, call) in enumerate(
            zip(box_stages(heads), self.region_boxes, self.predictor_calls, strict=True)
        ):
            (box_features, *_), (logits, deltas) = call
            if stage == 0:
                classes, matched = _sampled_labels(self.proposals, boxes)
            else:
                classes, matched = match_labels(
                    heads.proposal_matchers[stage], boxes, self.gt_instances, heads.num_classes
                )
            regions.append(
                Regions(
                    boxes,
                    box_features,
                    logits,
                    deltas,
                    predictor.box2box_transform,
                    gt_classes=classes,
                    gt_boxes=matched,
                )
            )
        return regions

    @property
    def shared(self) -> dict[str, Any]:
        return {"region_boxes": self.region_boxes}

    def share(self, shared: Mapping[str, Any]) -> None:
        boxes = shared.get("region_boxes")
        if boxes is not None and self.shared_sizes is not None:
            boxes = [[one.clone() for one in stage] for stage in boxes]
            for stage in boxes:
                for one, (h, w), x in zip(
                    stage, self.shared_sizes, self.batched_inputs, strict=True
                ):
                    height, width = x["image"].shape[-2:]
                    one.scale(width / w, height / h)
            shared = {**shared, "region_boxes": boxes}
        super().share(shared)

    @asked
    def proposals(self) -> list[Instances]:
        """Each image's proposals of the RPN, best first: ``proposal_boxes``, ``objectness_logits``.

        A student's are those its sampler chose, with ``gt_classes`` and ``gt_boxes``.
        """
        return self.detector.proposal_generator(self.images, self.features, None)[0]

    @asked
    def regions(self) -> list[Regions]:
        """One :class:`Regions` for each stage of shared boxes.

        Stage k is judged by stage k of this detector, or by its last one where it has fewer.
        A student's are those it trained with.
        """
        if self.predictor_calls is not None:
            return self._captured_regions()
        if self.region_boxes is None:
            raise Unreadable(
                f"no regions to ask a {type(self.detector).__name__} about: the student has none"
            )
        heads = self.detector.roi_heads
        stages = box_stages(heads)
        features = [self.features[level] for level in heads.box_in_features]
        regions = []
        for stage, boxes in enumerate(self.region_boxes):
            head, predictor = stages[min(stage, len(stages) - 1)]
            box_features = head(heads.box_pooler(features, boxes))
            logits, deltas = predictor(box_features)
            regions.append(
                Regions(boxes, box_features, logits, deltas, predictor.box2box_transform)
            )
        return regions


def _sampled_labels(proposals: list[Instances], boxes: list[Boxes]) -> tuple[Tensor, Tensor]:
    matched = [
        p.gt_boxes.tensor if p.has("gt_boxes") else b.tensor
        for p, b in zip(proposals, boxes, strict=True)
    ]
    return torch.cat([p.gt_classes for p in proposals]), torch.cat(matched)


@torch.no_grad()
def match_labels(
    matcher: Callable, boxes: list[Boxes], truth: list[Instances], num_classes: int
) -> tuple[Tensor, Tensor]:
    """Label boxes as a cascade's stage does: ``(R,)`` classes, background last, and ``(R, 4)`` matched boxes.

    In an image without ground truth all are background, and a box is its own match.
    """
    classes, matched = [], []
    for ours, gt in zip(boxes, truth, strict=True):
        if len(gt) == 0:
            classes.append(torch.full((len(ours),), num_classes, device=ours.device))
            matched.append(ours.tensor)
            continue
        index, flags = matcher(pairwise_iou(gt.gt_boxes, ours))
        classes.append(torch.where(flags == 0, num_classes, gt.gt_classes[index]))
        matched.append(gt.gt_boxes.tensor[index])
    return torch.cat(classes), torch.cat(matched)


@contextlib.contextmanager
def more_proposals(roi_heads: nn.Module, of: Callable[[], list[Instances]]) -> Iterator[None]:
    """While the block runs, RoI heads choose among their own proposals and those of another detector.

    Args:
        roi_heads: called as ``(images, features, proposals, …)``.
        of: gives the further proposals of each image.
    """

    def join(_, inputs: tuple) -> tuple:
        images, features, proposals, *rest = inputs
        joined = []
        for own, other in zip(proposals, of(), strict=True):
            further = Instances(own.image_size)
            for name, value in own.get_fields().items():
                theirs = other.get(name)
                further.set(name, theirs if isinstance(value, Boxes) else theirs.to(value.dtype))
            joined.append(Instances.cat([own, further]))
        return images, features, joined, *rest

    handle = roi_heads.register_forward_pre_hook(join)
    try:
        yield
    finally:
        handle.remove()
