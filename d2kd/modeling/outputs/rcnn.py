"""Outputs of two-stage detectors: proposals, and regions of RoI heads."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import BaseMaskRCNNHead
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


@dataclass
class MaskRegions:
    """Outputs of a mask head for its regions; row r belongs to box r.

    Attributes:
        boxes: a ``Boxes`` for each image, XYXY in absolute pixels; F boxes together. The student's are those of the
            foreground regions that its mask head was trained with.
        pred_mask_logits: ``(F, K, M, M)``, or ``(F, 1, M, M)`` if class-agnostic, on a grid over the box.
        class_agnostic: whether one mask is predicted for all classes.
        instances: the foreground regions of each image with their labels; None if the boxes have no labels.
    """

    boxes: list[Boxes]
    pred_mask_logits: Tensor
    class_agnostic: bool
    instances: list[Instances] | None = None

    @property
    def gt_classes(self) -> Tensor:
        """``(F,)`` in ``[0, K)``; of regions with labels."""
        return torch.cat([x.gt_classes for x in self.instances])

    @functools.cached_property
    def gt_masks(self) -> Tensor:
        """``(F, M, M)`` bool, the targets of Detectron2's ``mask_rcnn_loss``; of regions with labels."""
        logits = self.pred_mask_logits
        targets = [
            x.gt_masks.crop_and_resize(x.proposal_boxes.tensor, logits.shape[-1])
            for x in self.instances
            if len(x)  # without ground truth, there is no gt_masks
        ]
        if not targets:
            return torch.zeros_like(logits[:, 0], dtype=torch.bool)
        return torch.cat(targets).to(logits.device) > 0.5

    def select(self, classes: Tensor) -> Tensor:
        """Return the logits of each row's class, ``(F, M, M)``, for ``(F,)`` classes; those of a class-agnostic head."""
        if self.pred_mask_logits.shape[1] == 1:
            return self.pred_mask_logits[:, 0]
        rows = torch.arange(len(classes), device=classes.device)
        return self.pred_mask_logits[rows, classes]


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


def has_mask_regions(detector: nn.Module) -> bool:
    """Return whether a detector has a mask head on pooled regions, whose logits can be read."""
    heads = getattr(detector, "roi_heads", None)
    head = getattr(heads, "mask_head", None)
    return isinstance(head, BaseMaskRCNNHead) and getattr(heads, "mask_pooler", None) is not None


class RCNNOutputs(DetectorOutputs):
    """Outputs of a ``GeneralizedRCNN`` on an FPN: Faster and Mask R-CNN, and Cascade R-CNN with several stages."""

    predictor_calls: list[Call] | None = None
    """The recorded calls of a student's box predictors, one for each stage."""

    mask_calls: tuple[Call, Call] | None = None
    """The recorded calls of a student's mask head and of its layers."""

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
        if has_mask_regions(detector):
            hook_points["mask_head"] = heads.mask_head
            hook_points["mask_layers"] = heads.mask_head.layers
        return hook_points

    @staticmethod
    def _captured(calls: dict[str, list[Call]]) -> dict[str, Any]:
        ((_, features),) = calls["backbone"]
        ((inputs, (proposals, _)),) = calls["roi_heads"]
        # The pooler's inputs and not the proposals: later stages of a cascade pool other boxes, and with
        # train_on_pred_boxes the proposals change afterwards.
        stages = sum(name.startswith("box_predictor.") for name in calls)
        # A mask head may have the same pooler, and uses it last.
        boxes = [list(pooled) for (_, pooled), _ in calls["box_pooler"][:stages]]
        captured = {
            "features": OutputDict(features),
            "proposals": proposals,
            "region_boxes": boxes,
            "predictor_calls": [calls[f"box_predictor.{stage}"][0] for stage in range(len(boxes))],
        }
        if len(inputs) > 3:  # a user's own meta-architecture may pass them by keyword
            captured["gt_instances"] = inputs[3]
        if calls.get("mask_layers"):
            (mask_call,), (layers_call,) = calls["mask_head"], calls["mask_layers"]
            captured["mask_calls"] = mask_call, layers_call
            captured["mask_boxes"] = [x.proposal_boxes for x in mask_call[0][1]]
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

    def set_region_boxes(
        self, boxes: list[list[Boxes]] | None, mask_boxes: list[Boxes] | None = None
    ) -> None:
        """Have :attr:`regions` and :attr:`mask_regions` pool the student's boxes, in pixels of the student's images."""
        self.region_boxes = None if boxes is None else [self._scaled(stage) for stage in boxes]
        self.mask_boxes = None if mask_boxes is None else self._scaled(mask_boxes)

    def _scaled(self, boxes: list[Boxes]) -> list[Boxes]:
        """Return the student's boxes in each image, in pixels of this detector's images."""
        if self.student_image_sizes is None:
            return boxes
        boxes = [image_boxes.clone() for image_boxes in boxes]
        for image_boxes, (h, w), x in zip(
            boxes, self.student_image_sizes, self.batched_inputs, strict=True
        ):
            height, width = x["image"].shape[-2:]
            image_boxes.scale(width / w, height / h)
        return boxes

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

    @lazy_property
    def mask_regions(self) -> MaskRegions:
        """The outputs of the mask head for ``mask_boxes``. The student's are captured."""
        heads = self.detector.roi_heads
        if not has_mask_regions(self.detector):
            raise OutputNotAvailable(f"a {type(self.detector).__name__} without masks of regions")
        if self.mask_boxes is None:
            raise OutputNotAvailable("no boxes of masks: the student has none")
        instances = None
        if self.mask_calls is not None:
            ((_, instances), _), (_, logits) = self.mask_calls
        else:
            features = [self.features[level] for level in heads.mask_in_features]
            logits = heads.mask_head.layers(heads.mask_pooler(features, self.mask_boxes))
        class_agnostic = logits.shape[1] == 1 < heads.num_classes
        return MaskRegions(self.mask_boxes, logits, class_agnostic, instances)


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
