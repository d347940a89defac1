"""GFL: a dense detector that predicts a distribution for each box edge, and the IoU of the box as class score.

"Generalized Focal Loss: Learning Qualified and Distributed Bounding Boxes for Dense Object Detection"
(arXiv 2006.04388), with anchors labelled by ATSS (arXiv 1912.02424).

Notation: N images, K classes, R anchors of all levels together, one for each location, n = ``reg_max``: an edge
is a distribution over the n + 1 distances 0 … n, in strides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, batched_nms
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.structures.boxes import matched_pairwise_iou
from torch import Tensor, nn

from ...layers.focal_losses import distribution_focal_loss, quality_focal_loss
from ...utils.comm import reduce_mean
from ...utils.errors import InputError
from ...utils.metrics import put_metric
from ..atss import atss_matches, is_foreground
from ..box_regression import Box2BoxTransformStride, generalized_iou_loss, integral


@META_ARCH_REGISTRY.register()
class GFL(DenseDetector):
    """A dense detector with quality focal loss and distribution focal loss.

    Each location has one square anchor, used by ATSS to match locations to objects. A box is predicted as the
    location's distances to the left, top, right and bottom edge.

    Args:
        backbone: a backbone with a feature pyramid.
        head: a :class:`GFLHead`, or a module with ``reg_max`` n and the same outputs: for each level, class logits
            ``(N, K, Hi, Wi)`` and logits of the distances ``(N, 4 * (n + 1), Hi, Wi)``.
        num_classes: K.
        num_old_classes: the number of old classes, which are the first ones. The detector's own losses use the
            logits and the ground truth of the new classes alone, so that the logits of old classes get no
            gradient from them, neither as foreground nor as background (ERD, arXiv 2204.02136).
        head_in_features: names of the head's input feature maps, from fine to coarse; None: all.
        anchor_scale: side of an anchor in strides.
        topk_anchors: number of ATSS's candidates for each object on each level.
        qfl_beta: exponent of quality focal loss.
        cls_weight, box_weight, dfl_weight: weights of quality focal loss, GIoU loss, distribution focal loss.
        test_score_thresh, test_topk_candidates, test_nms_thresh, max_detections_per_image: as in
            :class:`~detectron2.modeling.meta_arch.RetinaNet`.
        pixel_mean, pixel_std: per channel, in the order of ``input_format``.
        input_format: channel order of the input images.

    Raises:
        InputError: there is no new class; or, in training, an object's class is old or does not exist.
    """

    classifier = "head.cls_score"
    """Name of the layer whose row k is class k, for :func:`~d2kd.modeling.inherit.inherit_weights`."""

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        num_classes: int,
        num_old_classes: int = 0,
        head_in_features: Sequence[str] | None = None,
        anchor_scale: float = 8,
        topk_anchors: int = 9,
        qfl_beta: float = 2.0,
        cls_weight: float = 1.0,
        box_weight: float = 2.0,
        dfl_weight: float = 0.25,
        test_score_thresh: float = 0.05,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.6,
        max_detections_per_image: int = 100,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "RGB",
    ):
        super().__init__(
            backbone, head, head_in_features, pixel_mean=pixel_mean, pixel_std=pixel_std
        )
        if not 0 <= num_old_classes < num_classes:
            raise InputError(
                "num_old_classes",
                num_old_classes,
                f"from 0 to {num_classes - 1}, below num_classes",
            )
        self.num_classes, self.num_old_classes = num_classes, num_old_classes
        self.reg_max = head.reg_max
        shapes = backbone.output_shape()
        strides = [shapes[name].stride for name in self.head_in_features]
        self.anchor_generator = DefaultAnchorGenerator(
            sizes=[[anchor_scale * stride] for stride in strides],
            aspect_ratios=[1.0],
            strides=strides,
            offset=0.0,
        )
        self.box2box_transform = Box2BoxTransformStride(anchor_scale)
        self.topk_anchors = topk_anchors

        self.qfl_beta = qfl_beta
        self.cls_weight, self.box_weight, self.dfl_weight = cls_weight, box_weight, dfl_weight

        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.max_detections_per_image = max_detections_per_image
        self.input_format = input_format

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        backbone = build_backbone(cfg)
        node = cfg.MODEL.GFL
        shapes = backbone.output_shape()
        features = [shapes[name] for name in node.IN_FEATURES]
        return {
            "backbone": backbone,
            "head": GFLHead(
                input_shape=features,
                num_classes=node.NUM_CLASSES,
                conv_dims=[features[0].channels] * node.NUM_CONVS,
                num_groups=node.NUM_GROUPS,
                reg_max=node.REG_MAX,
            ),
            "num_classes": node.NUM_CLASSES,
            "num_old_classes": node.NUM_OLD_CLASSES,
            "head_in_features": node.IN_FEATURES,
            "test_score_thresh": node.SCORE_THRESH_TEST,
            "test_topk_candidates": node.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": node.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
        }

    def forward(self, batched_inputs: list[dict]) -> Any:
        if self.training:
            for x in batched_inputs:
                if "instances" in x:  # usually on the CPU, where nothing waits
                    self._check_classes(x["instances"].gt_classes)
        return super().forward(batched_inputs)

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: list[list[Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        pred_logits, pred_distributions = self._transpose_predictions(predictions)
        anchors = self.anchor_generator(features)
        gt_labels, gt_boxes = self.label_anchors(anchors, gt_instances)
        foreground = is_foreground(torch.stack(gt_labels), self.num_classes).sum()
        put_metric("num_pos_anchors", foreground / len(gt_labels))
        return self.losses(anchors, pred_logits, gt_labels, pred_distributions, gt_boxes)

    def _transpose_predictions(
        self, predictions: list[list[Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        bins = self.reg_max + 1
        logits, distributions = self._transpose_dense_predictions(
            predictions, [self.num_classes, 4 * bins]
        )
        return logits, [x.unflatten(-1, (4, bins)) for x in distributions]

    @torch.no_grad()
    def label_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Label the anchors of each image by ATSS.

        An anchor is used if its center lies in the image, padded as if it were the only one of the batch; anchors
        in the rest of the padding are ignored.

        Args:
            anchors: boxes of each level.
            gt_instances: ground truth of each image, with its ``image_size`` in pixels of the input.

        Returns:
            for each image, labels ``(R,)`` in ``{-1, 0, …, K}``, -1 ignored and K background; and matched
            boxes ``(R, 4)``, which are valid for foreground anchors alone.
        """
        all_anchors = Boxes.cat(anchors)
        labels, boxes = [], []
        for gt, levels in zip(gt_instances, self.rows_inside(anchors, gt_instances)):
            row = torch.cat(levels).to(all_anchors.device, non_blocking=True)
            matches = row.new_full((len(all_anchors),), -1)
            inside = torch.zeros_like(matches, dtype=torch.bool).index_fill_(0, row, True)
            matches[row] = atss_matches(
                [Boxes(x) for x in all_anchors.tensor[row].split([len(level) for level in levels])],
                gt.gt_boxes,
                self.topk_anchors,
            )
            # Match -1, which is no object, indexes the row that is appended.
            classes, gt_boxes = gt.gt_classes, gt.gt_boxes.tensor
            label = torch.cat([classes, classes.new_full((1,), self.num_classes)])[matches]
            labels.append(torch.where(inside, label, -1))
            boxes.append(torch.cat([gt_boxes, gt_boxes.new_zeros(1, 4)])[matches])
        return labels, boxes

    def rows_inside(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> list[list[Tensor]]:
        """Return for each image and level the rows, in all levels together, of the anchors whose center is in the image.

        They are on the CPU. Usually the size of the images says which they are, and nothing waits for the device.
        """
        divisor = max(self.backbone.size_divisibility, 1)
        sizes = [
            [math.ceil(side / divisor) * divisor for side in gt.image_size] for gt in gt_instances
        ]
        strides, starts = self.anchor_generator.strides, [0]
        for level in anchors:
            starts.append(starts[-1] + len(level))
        # Cells of a level along each axis whose center, a multiple of the stride, is in an image, or in the batch.
        cells = [[[math.ceil(side / s) for side in size] for s in strides] for size in sizes]
        grids = [[max(sides) for sides in zip(*level)] for level in zip(*cells)]
        if [height * width for height, width in grids] == [len(level) for level in anchors]:
            every = [
                torch.arange(start, start + height * width).view(height, width)
                for start, (height, width) in zip(starts, grids)
            ]
            return [
                [level[:height, :width].flatten() for level, (height, width) in zip(every, image)]
                for image in cells
            ]
        # A backbone that rounds sizes down, or a larger batch of other images.
        centers = Boxes.cat(anchors).get_centers().cpu()
        inside = [(centers < torch.tensor(size[::-1])).all(dim=1) for size in sizes]
        return [
            [
                image[start:end].nonzero()[:, 0] + start
                for start, end in zip(starts[:-1], starts[1:])
            ]
            for image in inside
        ]

    def _check_classes(self, classes: Tensor) -> None:
        """Raise InputError unless the classes of all objects are new."""
        new = range(self.num_old_classes, self.num_classes)
        # A class beyond the last would be learned as background.
        if (wrong := classes[(classes < new.start) | (classes >= new.stop)]).numel():
            first = int(wrong[0])
            why = "which is an old one" if 0 <= first < new.start else "which is none"
            raise InputError(
                "ground truth",
                f"an object of class {first}, {why}",
                f"classes from {new.start} to {new.stop - 1}",
            )

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_distributions: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """Return ``loss_cls``, ``loss_box_reg`` and ``loss_dfl``, the sums of :meth:`anchor_losses`."""
        losses = self.anchor_losses(anchors, pred_logits, gt_labels, pred_distributions, gt_boxes)
        return {name: loss.sum() for name, loss in losses.items()}

    def anchor_losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_distributions: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """Return the losses of each anchor, weighted and normalized.

        ``loss_cls`` is divided by the number of foreground anchors of the batch, at least one per image. The other
        two weight an anchor by its highest score, and are divided by the sum of these weights. Both normalizers
        are means over processes, see :func:`~d2kd.utils.comm.reduce_mean`. The sum of weights is at least 1
        over all processes together; in the published code, its mean is. Logits of old classes are not used.

        Args:
            anchors: boxes of each level.
            pred_logits: for each level, ``(N, Hi * Wi, K)``.
            gt_labels, gt_boxes: outputs of :meth:`label_anchors`.
            pred_distributions: for each level, ``(N, Hi * Wi, 4, n + 1)``, before the softmax.

        Returns:
            {name of the loss: ``(N, R)``}.
        """
        labels = torch.stack(gt_labels)
        labels = torch.where(labels >= 0, labels - self.num_old_classes, labels)
        logits = torch.cat(pred_logits, dim=1)[..., self.num_old_classes :].float()
        foreground = is_foreground(labels, logits.shape[-1])
        image, row = foreground.nonzero(as_tuple=True)

        anchor = Boxes.cat(anchors).tensor[row]
        gt_box = torch.stack(gt_boxes)[image, row]
        edges = torch.cat(pred_distributions, dim=1)[image, row]
        boxes = self.box2box_transform.apply_deltas(integral(edges), anchor)

        quality = torch.zeros_like(logits)
        iou = matched_pairwise_iou(Boxes(boxes.detach()), Boxes(gt_box))
        quality[image, row, labels[image, row]] = iou.to(quality)
        score = logits.detach()[image, row].sigmoid().amax(dim=-1)
        num_foreground, total_score = reduce_mean(
            torch.stack([foreground.sum(dim=1).clamp(min=1).sum(), score.sum()])
        )

        def scatter_to_anchors(values: Tensor) -> Tensor:
            losses = torch.zeros_like(labels, dtype=values.dtype)
            losses[image, row] = values * score / total_score
            return losses

        qfl = quality_focal_loss(logits, quality, self.qfl_beta).sum(dim=-1)
        giou = generalized_iou_loss(boxes, gt_box)
        distances = self.box2box_transform.get_deltas(anchor, gt_box)
        dfl = distribution_focal_loss(edges, distances).mean(dim=-1)
        return {
            "loss_cls": self.cls_weight * qfl * (labels >= 0) / num_foreground,
            "loss_box_reg": self.box_weight * scatter_to_anchors(giou),
            "loss_dfl": self.dfl_weight * scatter_to_anchors(dfl),
        }

    def forward_inference(
        self, images: ImageList, features: list[Tensor], predictions: list[list[Tensor]]
    ) -> list[Instances]:
        pred_logits, pred_distributions = self._transpose_predictions(predictions)
        anchors = self.anchor_generator(features)
        return [
            self.inference_single_image(
                anchors,
                [x[i].float().sigmoid() for x in pred_logits],
                [integral(x[i]) for x in pred_distributions],
                image_size,
            )
            for i, image_size in enumerate(images.image_sizes)
        ]

    def inference_single_image(
        self,
        anchors: list[Boxes],
        scores: list[Tensor],
        deltas: list[Tensor],
        image_size: tuple[int, int],
    ) -> Instances:
        """Return the detections in an image, sorted by score.

        Args:
            anchors: boxes of each level.
            scores: for each level, ``(Hi * Wi, K)`` in [0, 1].
            deltas: for each level, ``(Hi * Wi, 4)`` in strides.
            image_size: (H, W), to which boxes are clipped; those that are then empty are removed before NMS.
        """
        detections = self._decode_multi_level_predictions(
            anchors,
            scores,
            deltas,
            self.test_score_thresh,
            self.test_topk_candidates,
            image_size,
        )
        detections.pred_boxes.clip(image_size)
        x = detections[detections.pred_boxes.nonempty()]
        keep = batched_nms(x.pred_boxes.tensor, x.scores, x.pred_classes, self.test_nms_thresh)
        return x[keep[: self.max_detections_per_image]]


class GFLHead(nn.Module):
    """Two towers of convolutions with group norm, shared by all levels, and a trainable scale of the edges per level.

    Args:
        input_shape: shape of each level; all have the same number of channels.
        num_classes: K.
        conv_dims: output channels of each convolution of a tower.
        num_groups: groups of the group norms; divides all of ``conv_dims``.
        reg_max: n, the largest distance in strides.
        prior_prob: initial score of all classes, which sets the bias of the classifier.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[ShapeSpec],
        num_classes: int,
        conv_dims: Sequence[int] = (256, 256, 256, 256),
        num_groups: int = 32,
        reg_max: int = 16,
        prior_prob: float = 0.01,
    ):
        super().__init__()
        self.reg_max = reg_max

        def tower() -> nn.Sequential:
            layers: list[nn.Module] = []
            for before, after in zip([input_shape[0].channels, *conv_dims], conv_dims):
                layers += [
                    nn.Conv2d(before, after, 3, padding=1, bias=False),
                    nn.GroupNorm(num_groups, after),
                    nn.ReLU(),
                ]
            return nn.Sequential(*layers)

        self.cls_subnet, self.bbox_subnet = tower(), tower()
        self.cls_score = nn.Conv2d(conv_dims[-1], num_classes, 3, padding=1)
        self.bbox_pred = nn.Conv2d(conv_dims[-1], 4 * (reg_max + 1), 3, padding=1)
        self.scales = nn.Parameter(torch.ones(len(input_shape)))

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
        nn.init.constant_(self.cls_score.bias, -math.log((1 - prior_prob) / prior_prob))
        nn.init.zeros_(self.bbox_pred.bias)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return, for each level, class logits ``(N, K, Hi, Wi)``, and logits of the distances to left, top, right
        and bottom edge ``(N, 4 * (n + 1), Hi, Wi)``, the latter in float32."""
        logits = [self.cls_score(self.cls_subnet(x)) for x in features]
        edges = [
            self.bbox_pred(self.bbox_subnet(x)).float() * scale
            for x, scale in zip(features, self.scales, strict=True)
        ]
        return logits, edges


def add_gfl_config(cfg: CfgNode) -> None:
    """Add ``MODEL.GFL`` to a yacs config; ``MODEL.META_ARCHITECTURE = "GFL"`` then uses it.

    ``MODEL.BACKBONE.NAME = "build_gfl_resnet_fpn_backbone"`` is GFL's backbone with its feature pyramid.
    """
    cfg.MODEL.GFL = CfgNode()
    cfg.MODEL.GFL.NUM_CLASSES = 80
    cfg.MODEL.GFL.NUM_OLD_CLASSES = 0
    cfg.MODEL.GFL.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    cfg.MODEL.GFL.NUM_CONVS = 4
    cfg.MODEL.GFL.NUM_GROUPS = 32
    cfg.MODEL.GFL.REG_MAX = 16
    cfg.MODEL.GFL.SCORE_THRESH_TEST = 0.05
    cfg.MODEL.GFL.TOPK_CANDIDATES_TEST = 1000
    cfg.MODEL.GFL.NMS_THRESH_TEST = 0.6
