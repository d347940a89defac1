"""Outputs of two-stage detectors: proposals, and regions of RoI heads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor, nn

from .base import DetectorOutputs, OutputDict, OutputNotAvailable, lazy_property
from .capture import Call


@dataclass
class Regions:
    """Outputs of one stage of RoI heads for its regions; row r belongs to box r.

    Attributes:
        boxes: a ``Boxes`` for each image, XYXY in absolute pixels; R boxes together.
        box_features: ``(R, D)``, inputs of the box predictor.
        pred_class_logits: ``(R, K + 1)``, background last.
        pred_proposal_deltas: ``(R, 4K)``, or ``(R, 4)`` if class-agnostic.
        box2box_transform: the transform of the deltas.
        gt_classes: ``(R,)`` in ``[0, K]``, K background; None if the boxes have no labels, as those of unlabelled images.
        gt_boxes: ``(R, 4)`` matched ground truth; in an image without any, the boxes themselves; None as ``gt_classes``.
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
    """Return (box head, box predictor) of each stage: one in ``StandardROIHeads``, several in a cascade."""
    heads, predictors = roi_heads.box_head, roi_heads.box_predictor
    if isinstance(predictors, nn.ModuleList):
        return list(zip(heads, predictors, strict=True))
    return [(heads, predictors)]


def uses_sigmoid_scores(detector: nn.Module) -> bool:
    """Return whether an R-CNN's class scores are sigmoids (``use_sigmoid_ce``, after Detectron2 0.6).

    The background logit is then not trained, so that a softmax over the logits gives no valid scores.
    """
    stages = box_stages(detector.roi_heads)
    return any(getattr(predictor, "use_sigmoid_ce", False) for _, predictor in stages)


class RCNNOutputs(DetectorOutputs):
    """Outputs of a ``GeneralizedRCNN`` on an FPN: Faster and Mask R-CNN, and Cascade R-CNN with several stages."""

    predictor_calls: list[Call] | None = None
    """The recorded calls of a student's box predictors, one for each stage."""

    computed_by = {
        "backbone": "features",
        "proposal_generator": "proposals",
        "roi_heads": "regions",
    }

    @classmethod
    def hook_points(cls, detector: nn.Module) -> dict[str, nn.Module | Callable]:
        heads = detector.roi_heads
        hook_points = {
            "backbone": detector.backbone,
            "roi_heads": heads,
            "box_pooler": heads.box_pooler,
        }
        for stage, (_, predictor) in enumerate(box_stages(heads)):
            hook_points[f"box_predictor.{stage}"] = predictor
        return hook_points

    @staticmethod
    def _captured(calls: dict[str, list[Call]]) -> dict[str, Any]:
        ((_, features),) = calls["backbone"]
        ((inputs, (proposals, _)),) = calls["roi_heads"]
        # The pooler's inputs and not the proposals: later stages of a cascade pool other boxes, and with
        # train_on_pred_boxes the proposals change afterwards.
        boxes = [list(pooled) for (_, pooled), _ in calls["box_pooler"]]
        captured = {
            "features": OutputDict(features),
            "proposals": proposals,
            "region_boxes": boxes,
            "predictor_calls": [calls[f"box_predictor.{stage}"][0] for stage in range(len(boxes))],
        }
        if len(inputs) > 3:  # a user's own meta-architecture may pass them by keyword
            captured["gt_instances"] = inputs[3]
        return captured

    def _captured_regions(self) -> list[Regions]:
        """Return the student's regions, with the labels used in its task losses."""
        heads, regions = self.detector.roi_heads, []
        for stage, ((_, predictor), boxes, call) in enumerate(
            zip(box_stages(heads), self.region_boxes, self.predictor_calls, strict=True)
        ):
            (box_features, *_), (logits, deltas) = call
            classes = matched = None
            if stage == 0 and self.is_labelled:
                classes, matched = _sampled_labels(self.proposals, boxes)
            elif self.is_labelled:
                classes, matched = match_and_label_boxes(
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

    def set_region_boxes(self, boxes: list[list[Boxes]] | None) -> None:
        """Have :attr:`regions` pool the student's boxes, in pixels of the student's images."""
        if boxes is not None and self.student_image_sizes is not None:
            boxes = [[image_boxes.clone() for image_boxes in stage] for stage in boxes]
            for stage in boxes:
                for image_boxes, (h, w), x in zip(
                    stage, self.student_image_sizes, self.batched_inputs, strict=True
                ):
                    height, width = x["image"].shape[-2:]
                    image_boxes.scale(width / w, height / h)
        self.region_boxes = boxes

    @lazy_property
    def proposals(self) -> list[Instances]:
        """The RPN's proposals in each image, sorted by score: ``proposal_boxes``, ``objectness_logits``.

        The student's are the sampled proposals, with ``gt_classes`` and ``gt_boxes``; of unlabelled images, all background.
        """
        return self.detector.proposal_generator(self.images, self.features, None)[0]

    @lazy_property
    def regions(self) -> list[Regions]:
        """One :class:`Regions` for each stage of ``region_boxes``.

        Stage k is predicted by stage k of this detector, or by its last one if it has fewer.
        The student's are captured.
        """
        if self.predictor_calls is not None:
            return self._captured_regions()
        if self.region_boxes is None:
            raise OutputNotAvailable(
                f"no region boxes for a {type(self.detector).__name__}: the student has none"
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
def match_and_label_boxes(
    matcher: Callable, boxes: list[Boxes], truth: list[Instances], num_classes: int
) -> tuple[Tensor, Tensor]:
    """Label boxes like a stage of Detectron2's ``CascadeROIHeads``.

    Returns:
        ``(R,)`` classes in ``[0, K]``, K background, and ``(R, 4)`` matched boxes. In an image without ground
        truth, all boxes are background, and each is its own match.
    """
    classes, matched = [], []
    for image_boxes, gt in zip(boxes, truth, strict=True):
        if len(gt) == 0:
            classes.append(torch.full((len(image_boxes),), num_classes, device=image_boxes.device))
            matched.append(image_boxes.tensor)
            continue
        index, flags = matcher(pairwise_iou(gt.gt_boxes, image_boxes))
        classes.append(torch.where(flags == 0, num_classes, gt.gt_classes[index]))
        matched.append(gt.gt_boxes.tensor[index])
    return torch.cat(classes), torch.cat(matched)


@contextlib.contextmanager
def append_proposals(roi_heads: nn.Module, of: Callable[[], list[Instances]]) -> Iterator[None]:
    """Append another detector's proposals to the inputs of RoI heads while the block runs.

    Args:
        roi_heads: the module, called as ``(images, features, proposals, …)``.
        of: a function that returns the proposals to append, for each image.
    """

    def append(_, inputs: tuple) -> tuple:
        images, features, proposals, *rest = inputs
        joined = []
        for own, other in zip(proposals, of(), strict=True):
            extra = Instances(own.image_size)
            for name, value in own.get_fields().items():
                field = other.get(name)
                extra.set(name, field if isinstance(value, Boxes) else field.to(value.dtype))
            joined.append(Instances.cat([own, extra]))
        return images, features, joined, *rest

    handle = roi_heads.register_forward_pre_hook(append)
    try:
        yield
    finally:
        handle.remove()
