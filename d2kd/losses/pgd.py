"""PGD: features are compared where the teacher predicts an object best."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor, nn

from ..layers.feature_rms import sums_of_squares
from ..utils.errors import InputError
from .base import SeededLoss, Weight
from .dense import DenseLoss, Tower, decode_boxes, tower_adapters, tower_of
from .fgd import spatial_attention
from .functional import in_float32

MASKS = ("own", "all")
TOWERS = {"classification": "cls_subnet", "regression": "bbox_subnet"}


class PGDLoss(DenseLoss, SeededLoss):
    """Compare the features of two dense heads where the teacher's predictions of objects are best.

    PGD, "Prediction-Guided Distillation for Dense Object Detection", ECCV 2022 (arXiv 2203.05469), after the authors' code.
    For an object g of class c, the quality of an anchor a is p_ac^(1-xi) IoU(teacher's box a, g)^xi, with the teacher's
    class score p and another xi for each tower. A Gaussian is fitted to the centers, with some noise, of the ``topk``
    anchors with the highest quality. The value of such an anchor is that of the Gaussian, with a maximum of 1, if its
    center lies in the object. A cell has the highest value of its anchors and all objects, else 0. Background are cells
    whose center lies in no object.

    Compared are S and T, the maps after the first block of each tower, C channels in H W cells, with the attentions

        Sp(F) = H W softmax over cells of (mean_c |F| / tau),   Ch(F) = C softmax over channels of (|F| / tau) in each cell

    Classification, for each level with its weight u and averaged over images:

        u sum over cells of (w_f M + w_b B) Sp(T) sum_c Ch(T) (S - T)^2
          + w_a (1/(H W) sum |Ch(S) - Ch(T)| + sum |Sp(S) - Sp(T)|)

    with the map M and the background B of the image, each divided by its number of cells that are not 0. Regression, for
    each level as a mean over the cells of the batch whose M is not 0:

        w_r M mean_c Ch(T) (S - T)^2 + w_a sum_c |Ch(S) - Ch(T)|

    In the authors' code, the errors of each image are summed under the masks of all images of a process:
    ``masks="all"``. Published weights of the classification are those of this form, with four images. Their map for
    detectors without anchors also exchanges x and y, and that of GFL takes strides of images for those of levels. These
    errors are not repeated here. Not in the paper: several anchors in a cell (RetinaNet).

    Features are squared, and tau is in their units. So by default both sides are divided by the root mean square of the
    teacher's map, over the cells that this process's images cover: each tower and level has its own, which changes from
    batch to batch. Where the towers differ in width, a 1x1 convolution shared by all levels brings the student's maps to
    the teacher's width. Objects of a class that the teacher lacks have no map, and are no background either.

    Reads: the maps of the towers on both sides; ``student.anchors``, ``gt_instances``; ``teacher.pred_logits``,
    ``pred_anchor_deltas``, and ``images`` with ``normalize``.

    Args:
        topk: number of anchors for each object, of all levels.
        classification_exponent, regression_exponent: xi of each tower.
        foreground_weight, background_weight, regression_weight, attention_weight: w_f, w_b, w_r, w_a.
        temperature: tau.
        level_weights: u of each level. None: 1, 1.25, 1.5, … from the finest on.
        masks: "own", or "all" as in the authors' code.
        normalize: whether maps are compared in units of the teacher. False, as published: as they are.
        seed: of the noise, see :class:`~d2kd.losses.SeededLoss`.
        weight: a number or a schedule.
        across_processes: see :class:`~d2kd.losses.DistillLoss`.

    Raises:
        InputError: if an option is invalid. In ``setup``: if a head has no towers ``cls_subnet`` and ``bbox_subnet`` or
            there are not as many levels as weights; see also :class:`~d2kd.losses.dense.DenseLoss`.

    Example:
        >>> from d2kd.testing import batch, distiller, forward_losses, tiny_fcos
        >>> model = distiller(PGDLoss, tiny_fcos, same=True)  # the teacher is a copy
        >>> [value.item() for key, value in forward_losses(model, batch()).items() if key.startswith("distill/")]
        [0.0, 0.0]
    """

    def __init__(
        self,
        *,
        topk: int = 30,
        classification_exponent: float = 0.8,
        regression_exponent: float = 0.6,
        foreground_weight: float = 0.04,
        background_weight: float = 0.02,
        regression_weight: float = 0.064,
        attention_weight: float = 8e-4,
        temperature: float = 0.8,
        level_weights: Sequence[float] | None = None,
        masks: str = "own",
        normalize: bool = True,
        seed: int = 0,
        weight: Weight = 1.0,
        across_processes: bool = True,
    ):
        super().__init__(seed=seed, weight=weight, across_processes=across_processes)
        if masks not in MASKS:
            raise InputError("masks", masks, " or ".join(MASKS))
        if topk < 1:
            raise InputError("topk", topk, "at least 1")
        self.topk = topk
        self.exponents = {
            "classification": classification_exponent,
            "regression": regression_exponent,
        }
        self.foreground_weight, self.background_weight = foreground_weight, background_weight
        self.regression_weight, self.attention_weight = regression_weight, attention_weight
        self.temperature = temperature
        self.level_weights = None if level_weights is None else [float(u) for u in level_weights]
        self.masks, self.normalize = masks, normalize

    def setup(self, student: nn.Module, teacher: nn.Module) -> None:
        super().setup(student, teacher)
        self.towers: dict[str, tuple[Tower, Tower]] = {
            name: (tower_of(student, tower), tower_of(teacher, tower))
            for name, tower in TOWERS.items()
        }
        towers = [tower for pair in self.towers.values() for tower in pair]
        if not all(tower.blocks for tower in towers):
            raise InputError("head", "a tower without a block", "at least one, with a ReLU")
        levels = len(student.head_in_features)
        if self.level_weights is None:
            self.level_weights = [1 + k / 4 for k in range(levels)]
        if len(self.level_weights) != levels:
            raise InputError(
                "level_weights", f"{len(self.level_weights)}", f"one for each of {levels} levels"
            )
        self.adapters = tower_adapters(self.towers, 1)
        self.taps = tuple(s.after_relu(1) for s, _ in self.towers.values())
        self.teacher_taps = tuple(t.after_relu(1) for _, t in self.towers.values())

    def forward(self, student, teacher) -> dict[str, Tensor]:
        terms = self.terms(self.map_pairs(student, teacher), self.prediction_maps(student, teacher))
        return {name: sum(levels) for name, levels in terms.items()}

    def map_pairs(self, student, teacher) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """Return for each tower and level the maps of student and teacher, ``(N, C, H, W)`` float32."""
        pairs = {}
        for name, (s, t) in self.towers.items():
            maps = [self.adapters[s.name](x).float() for x in student.taps[s.after_relu(1)]]
            targets = [x.float() for x in teacher.taps[t.after_relu(1)]]
            units = self._units(teacher, targets) if self.normalize else [1.0] * len(targets)
            pairs[name] = [
                (x / r, target / r) for x, target, r in zip(maps, targets, units, strict=True)
            ]
        return pairs

    def _units(self, teacher, maps: list[Tensor]) -> list[Tensor]:
        """Return the root mean square of each map over the cells that the images cover."""
        squares, counts = sums_of_squares(teacher.images, maps)
        return list((squares / counts).sqrt().float().clamp(min=1e-6))

    @torch.no_grad()
    def prediction_maps(self, student, teacher) -> dict[str, list[Tensor]]:
        """Return for each level the maps "classification", "regression" and "background", ``(N, H, W)``."""
        scores = self.shared_classes(torch.cat(teacher.pred_logits, dim=1), "teacher").sigmoid()
        deltas = torch.cat(teacher.pred_anchor_deltas, dim=1)
        boxes = decode_boxes(teacher.detector, deltas, student.anchors)
        generator, uniforms = self.generator(), []
        for gt in student.gt_instances:
            shape = len(gt), min(self.topk, scores.shape[1]), 2
            draws = (torch.rand(shape, generator=generator) for _ in self.exponents)
            draws = (x.to(scores.device, non_blocking=True) for x in draws)
            uniforms.append(dict(zip(self.exponents, draws)))
        sizes = [tuple(x.shape[-2:]) for x in teacher.predictions[0]]
        return self.maps_of(scores, boxes, student.anchors, student.gt_instances, uniforms, sizes)

    def maps_of(
        self,
        scores: Tensor,
        boxes: Tensor,
        anchors: list[Boxes],
        gt_instances: list[Instances],
        uniforms: list[dict[str, Tensor]],
        sizes: list[tuple[int, int]],
    ) -> dict[str, list[Tensor]]:
        """Return :meth:`prediction_maps`.

        Args:
            scores: ``(N, R, K)`` of the teacher.
            boxes: ``(N, R, 4)`` of the teacher, XYXY.
            anchors: boxes of each level.
            gt_instances: objects of each image.
            uniforms: for each image and tower, random numbers in [0, 1), ``(G, topk, 2)``: x and y.
            sizes: ``(H, W)`` of each level.
        """
        centers = Boxes.cat(anchors).get_centers()
        rows: dict[str, list[Tensor]] = {name: [] for name in (*self.exponents, "background")}
        for p, box, gt, uniform in zip(scores, boxes, gt_instances, uniforms, strict=True):
            classes, gt_boxes = gt.gt_classes, gt.gt_boxes
            if self.class_map is not None:
                classes = self.class_map.map_labels(classes)
            low, high = gt_boxes.tensor.split(2, dim=1)
            inside = ((centers[:, None] > low) & (centers[:, None] < high)).all(dim=-1)  # (R, G)
            iou = pairwise_iou(Boxes(box), gt_boxes)
            score = p[:, classes.clamp(min=0)]
            for name, exponent in self.exponents.items():
                quality = score ** (1 - exponent) * iou**exponent
                rows[name].append(
                    gaussian_map(centers, quality, inside & (classes >= 0), uniform[name])
                )
            rows["background"].append((~inside.any(dim=1)).float())
        found = {}
        for name, images in rows.items():
            levels = torch.stack(images).split([len(level) for level in anchors], dim=1)
            # With several anchors in a cell, its highest value.
            found[name] = [
                x.view(len(x), *size, -1).amax(dim=-1)
                for x, size in zip(levels, sizes, strict=True)
            ]
        return found

    def terms(
        self, pairs: dict[str, list[tuple[Tensor, Tensor]]], maps: dict[str, list[Tensor]]
    ) -> dict[str, list[Tensor]]:
        """Return the terms "classification" and "regression" of each level, of :meth:`map_pairs` and :meth:`prediction_maps`."""
        cells = [(x != 0).sum() for x in maps["regression"]]
        images = cells[0].new_full((), len(maps["regression"][0]))
        images, *cells = self.normalizer(images, *cells)
        classification = [
            self.classification(s, t, foreground, background, weight) / images
            for (s, t), foreground, background, weight in zip(
                pairs["classification"],
                maps["classification"],
                maps["background"],
                self.level_weights,
                strict=True,
            )
        ]
        regression = [
            self.regression(s, t, mask) / count
            for (s, t), mask, count in zip(pairs["regression"], maps["regression"], cells)
        ]
        return {"classification": classification, "regression": regression}

    def classification(
        self,
        student: Tensor,
        teacher: Tensor,
        foreground: Tensor,
        background: Tensor,
        weight: float,
    ) -> Tensor:
        """Return the sum over images of the classification term of a level with a weight.

        Args:
            student, teacher: ``(N, C, H, W)``.
            foreground, background: ``(N, H, W)``.
        """
        both = student, teacher
        s_cells, t_cells = (spatial_attention(x, self.temperature) for x in both)
        s_channels, t_channels = (channel_attention(x, self.temperature) for x in both)
        error = t_cells * (t_channels * (student - teacher).square()).sum(dim=1)
        mask = self.foreground_weight * _per_cell(foreground)
        mask = mask + self.background_weight * _per_cell(background)
        if self.masks == "all":
            mask = mask.sum(dim=0, keepdim=True)
        cells = s_cells[0].numel()
        attention = (s_channels - t_channels).abs().sum() / cells + (s_cells - t_cells).abs().sum()
        return weight * (mask * error).sum() + self.attention_weight * attention

    def regression(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        """Return the sum over cells of the regression term of a level; ``mask``: ``(N, H, W)``."""
        s_channels, t_channels = (
            channel_attention(x, self.temperature) for x in (student, teacher)
        )
        error = mask * (t_channels * (student - teacher).square()).mean(dim=1)
        attention = (s_channels - t_channels).abs().sum(dim=1).where(mask != 0, 0)
        return self.regression_weight * error.sum() + self.attention_weight * attention.sum()


@in_float32
def channel_attention(x: Tensor, temperature: float) -> Tensor:
    """Return ``C softmax(|F| / tau)`` over the channels of each cell, of the shape of ``F``, ``(N, C, H, W)``."""
    return x.shape[1] * (x.abs() / temperature).softmax(dim=1)


def gaussian_map(centers: Tensor, quality: Tensor, counts: Tensor, uniform: Tensor) -> Tensor:
    """Return the values of anchors, ``(R,)`` in [0, 1], by a Gaussian for each object; see :class:`PGDLoss`.

    Args:
        centers: ``(R, 2)``, of the anchors, in pixels.
        quality: ``(R, G)``, of each anchor for each object.
        counts: ``(R, G)`` bool, whether the value of an anchor counts.
        uniform: ``(G, k, 2)`` in [0, 1): noise for the centers of the k anchors with the highest quality.
    """
    index = quality.topk(uniform.shape[1], dim=0).indices  # (k, G)
    chosen = centers[index]
    chosen = chosen - chosen.mean(dim=0)  # rounds less than coordinates in the image
    noisy = chosen + (uniform.transpose(0, 1) - 0.5) * 0.1
    mean = noisy.mean(dim=0)
    (x, y), (dx, dy) = (noisy - mean).unbind(dim=-1), (chosen - mean).unbind(dim=-1)
    xx, xy, yy = (x * x).mean(dim=0), (x * y).mean(dim=0), (y * y).mean(dim=0)
    determinant = xx * yy - xy * xy + 1e-10
    distance = (yy * dx * dx - 2 * xy * dx * dy + xx * dy * dy) / determinant
    values = (-distance / 2).exp() * counts.gather(0, index)
    found = values.new_zeros(len(centers))
    return found.scatter_reduce(0, index.flatten(), values.flatten(), "amax")


def _per_cell(mask: Tensor) -> Tensor:
    """Divide each image's mask by the number of its cells that are not 0."""
    return mask / (mask != 0).sum(dim=(1, 2), keepdim=True).clamp(min=1)
