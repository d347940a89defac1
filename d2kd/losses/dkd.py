"""Decoupled knowledge distillation: the label's probability and the distribution over the other classes, apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..utils.errors import InputError
from .base import DistillLoss, Weight
from .functional import in_float32, resolve_normalizer
from .regions import check_softmax_regions, shared_region_logits

BACKGROUNDS = ("class", "left_out")


class DKDLoss(DistillLoss):
    """Compare the classes of regions in two parts with weights of their own (DKD, CVPR 2022, arXiv 2203.08679).

    For the student's R sampled regions with labels y, the background being a class, and probabilities at temperature tau:

        b = (p_y, 1 - p_y),   q = softmax over the classes other than y

        loss = tau^2 1/R sum_i [ w_t KL(b_T,i || b_S,i) + w_n KL(q_T,i || q_S,i) ]

    Equations 5 to 7 of the paper, on the regions of a Faster R-CNN as in the authors' code. The parts are computed from
    logarithms of sums of exponentials, so that a very sure teacher gives no infinity. The stages of a cascade are summed.
    With one class and the background, q has one entry, and the second part is 0.

    If the class lists differ (``class_map``), the shared classes and the background are compared, and regions whose class the
    teacher does not have are left out.

    In unlabelled images, y is the teacher's most probable class, background included. This is this project's choice.

    Reads: ``student.regions``, ``teacher.regions``.

    Args:
        target_weight, non_target_weight: w_t and w_n.
        temperature: tau.
        background: "class", as published; or "left_out", regions without an object are not compared.
        weight: a number or a schedule.
        across_processes: see :class:`~d2kd.losses.DistillLoss`.

    Raises:
        InputError: an argument is invalid. In ``setup``: a detector has no regions, or its classes have no softmax; the classes
            differ and their names were not given, or none is shared.

    Example:
        >>> from d2kd.testing import batch, distiller, forward_losses, tiny_faster_rcnn
        >>> model = distiller(DKDLoss, tiny_faster_rcnn, same=True)  # the teacher is a copy
        >>> {key: value.item() for key, value in forward_losses(model, batch()).items() if key.startswith("distill/")}
        {'distill/loss_loss_target': 0.0, 'distill/loss_loss_non_target': 0.0}
    """

    needs_ground_truth = False

    def __init__(
        self,
        *,
        target_weight: float = 1.0,
        non_target_weight: float = 0.25,
        temperature: float = 1.0,
        background: str = "class",
        weight: Weight = 1.0,
        across_processes: bool = True,
    ):
        super().__init__(weight=weight, across_processes=across_processes)
        if background not in BACKGROUNDS:
            raise InputError("background", background, " or ".join(BACKGROUNDS))
        if not temperature > 0:
            raise InputError("temperature", temperature, "a number above 0")
        self.target_weight, self.non_target_weight = target_weight, non_target_weight
        self.temperature, self.background = temperature, background

    def setup(self, student: nn.Module, teacher: nn.Module) -> None:
        check_softmax_regions(student, teacher, self.class_map)

    def forward(self, student, teacher) -> dict[str, Tensor]:
        stages = [
            self.stage_terms(s, t) for s, t in zip(student.regions, teacher.regions, strict=True)
        ]
        target, non_target = (sum(terms) for terms in zip(*stages))
        return {
            "target": self.target_weight * target,
            "non_target": self.non_target_weight * non_target,
        }

    def stage_terms(self, student, teacher) -> tuple[Tensor, Tensor]:
        """Return both unweighted parts of two ``Regions`` with equal boxes."""
        s, t, labels = shared_region_logits(student, teacher, self.class_map)
        if self.background == "left_out":
            labels = torch.where(labels == s.shape[1] - 1, -1, labels)
        (normalizer,) = self.normalizer((labels >= 0).sum())
        return decoupled_terms(s, t, labels, temperature=self.temperature, normalizer=normalizer)


@in_float32
def decoupled_terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    normalizer: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``tau^2 1/R sum KL(b_T || b_S)`` and ``tau^2 1/R sum KL(q_T || q_S)``.

    Args:
        student_logits, teacher_logits: ``(R, K)``, in which the background is a class.
        labels: ``(R,)`` in ``[0, K)``. Rows of negative labels are left out and not counted in R.
        temperature: tau.
        normalizer: replaces R.

    Example:
        >>> student, teacher = torch.zeros(1, 3), torch.tensor([[2.0, 0.0, 0.0]])
        >>> [round(x.item(), 4) for x in decoupled_terms(student, teacher, torch.tensor([0]))]
        [0.433, 0.0]
    """
    valid = labels >= 0
    label = labels.clamp(min=0)[:, None]
    (s_binary, s_others), (t_binary, t_others) = (
        _log_parts(x / temperature, label) for x in (student_logits, teacher_logits)
    )
    divergences = []
    for s, t in ((s_binary, t_binary), (s_others, t_others)):
        # Entries of log-probability -inf are impossible on both sides.
        rows = (t.exp() * (t - s)).where(t > -torch.inf, 0).sum(dim=1)
        divergences.append(rows.where(valid, 0).sum())
    count = resolve_normalizer(valid.sum(), normalizer)
    return tuple(temperature**2 * x / count for x in divergences)


def _log_parts(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Return log b, ``(R, 2)``, and log q, ``(R, K)``, -inf at the label."""
    at_label = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, label, True)
    others = logits.masked_fill(at_label, -torch.inf)
    rest = others.logsumexp(dim=1, keepdim=True)
    binary = F.log_softmax(torch.cat([logits.gather(1, label), rest], dim=1), dim=1)
    return binary, others - rest
