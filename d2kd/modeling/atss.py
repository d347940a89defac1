"""Adaptive training sample selection (ATSS), which matches anchors to objects."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor


def is_foreground(labels: Tensor, num_classes: int) -> Tensor:
    """Return a mask of the labels that are a class: neither ignored (-1) nor background (``num_classes``)."""
    return (labels >= 0) & (labels < num_classes)


def atss_matches(anchors: list[Boxes], gt_boxes: Boxes, topk: int = 9) -> Tensor:
    """Match anchors to objects by adaptive training sample selection (ATSS, arXiv 1912.02424).

    The candidates of an object are the ``topk`` anchors of each level with the nearest centers. A candidate
    matches if its IoU with the object is at least the mean plus the standard deviation of the candidates' IoU,
    and if its center lies inside the object by more than 0.01 pixel. An anchor that matches several objects is
    assigned to the one with the highest IoU. An object may have no match.

    Args:
        anchors: boxes of each level, R together.
        gt_boxes: boxes of G objects.

    Returns:
        ``(R,)``, the index of the matched object, -1 for none.
    """
    matches = torch.full((sum(map(len, anchors)),), -1, device=gt_boxes.device)
    if not len(gt_boxes) or not len(matches):
        return matches
    candidates = atss_candidates(anchors, gt_boxes, topk)
    candidate, overlap = candidates.rows, candidates.iou.gather(0, candidates.rows)
    top_left, bottom_right = gt_boxes.tensor.split(2, dim=1)
    center = Boxes.cat(anchors).get_centers()[candidate]
    inside = torch.cat([center - top_left, bottom_right - center], dim=-1).amin(dim=-1) > 0.01
    positive = inside & (overlap >= candidates.threshold)

    chosen = torch.full_like(candidates.iou, -1).scatter(
        0, candidate, torch.where(positive, overlap, -1.0)
    )
    best, index = chosen.max(dim=1)
    return torch.where(best >= 0, index, matches)


@dataclass(frozen=True)
class Candidates:
    """The candidates of ATSS.

    Attributes:
        rows: ``(C, G)``, the candidates of each object among the anchors of all levels.
        iou: ``(R, G)``, of all anchors and objects.
        threshold: ``(G,)``, the mean plus the sample standard deviation of the candidates' IoU.
    """

    rows: Tensor
    iou: Tensor
    threshold: Tensor


def atss_candidates(anchors: list[Boxes], gt_boxes: Boxes, topk: int = 9) -> Candidates:
    """Return the ``topk`` anchors of each level with the nearest centers, for each object.

    Args:
        anchors, gt_boxes: as in :func:`atss_matches`; neither is empty.
    """
    all_anchors = Boxes.cat(anchors)
    centers = all_anchors.get_centers()
    distance = (centers[:, None] - gt_boxes.get_centers()).square().sum(dim=-1).sqrt()  # (R, G)
    rows, start = [], 0
    for level in distance.split([len(level) for level in anchors]):
        nearest = level.topk(min(topk, len(level)), dim=0, largest=False).indices
        rows.append(nearest + start)
        start += len(level)
    candidate = torch.cat(rows)
    iou = pairwise_iou(all_anchors, gt_boxes)
    overlap = iou.gather(0, candidate)
    return Candidates(candidate, iou, overlap.mean(dim=0) + overlap.std(dim=0))
