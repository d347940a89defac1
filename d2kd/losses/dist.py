"""Correlation of class probabilities, over the classes of a region or cell and over the regions or cells of a class."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..modeling.anchors import check_anchors
from ..structures.class_map import check_shared_classes, num_shared_classes
from ..utils.errors import InputError
from .base import DistillLoss, Weight
from .functional import in_float32
from .regions import check_softmax_regions

EPSILON = 1e-8


class DISTLoss(DistillLoss):
    """Compare class probabilities up to an offset and a factor (DIST, NeurIPS 2022, arXiv 2205.10536).

    P and Q are the probabilities of student and teacher, B rows and M columns. With rho Pearson's correlation of two
    vectors, equations 7 to 10 of the paper:

        loss = w_inter 1/B sum_r (1 - rho(P_r, Q_r)) + w_intra 1/M sum_c (1 - rho(P_:c, Q_:c))

    Two-stage detectors: the rows are the student's sampled regions, and P is the softmax over K classes and the background.
    The stages of a cascade are summed. One-stage detectors: the rows are the cells of a level, the columns its A anchors
    times K classes, and P are sigmoids. The levels are summed. With one class and the background the correlation of a row
    is 1 or -1, so only columns teach anything.

    A correlation of nearly constant rows is noise. Most cells of a well-trained dense detector are of this kind. So rows and
    columns in which the teacher's values have a spread below ``floor`` are left out. The spread is the norm of the
    differences to the mean. The authors' code keeps them and adds 1e-8 to the denominator, so equal detectors have a loss
    above 0, with a gradient.

    Columns are those of this process's batch, also with ``across_processes``: a correlation over all processes would need
    all probabilities in each. If the class lists differ (``class_map``), the columns of the shared classes are compared, after
    the softmax over all.

    Reads: ``student.regions``, ``teacher.regions``; or ``pred_logits`` of both.

    Args:
        inter_weight, intra_weight: w_inter, of rows, and w_intra, of columns.
        floor: see above. 0: the authors' form.
        weight: a number or a schedule.
        across_processes: whether the number of rows is that of all processes, see :class:`~d2kd.losses.DistillLoss`.

    Raises:
        InputError: an argument is invalid. In ``setup``: one detector is two-stage and the other one-stage, box heads have no
            softmax, anchors differ, the classes differ and their names were not given, none is shared, or there is one
            column alone.

    Example:
        >>> from d2kd.testing import batch, distiller, forward_losses, tiny_faster_rcnn
        >>> losses = forward_losses(distiller(DISTLoss, tiny_faster_rcnn), batch())
        >>> [key for key in losses if key.startswith("distill/")]
        ['distill/loss_loss_inter', 'distill/loss_loss_intra']
    """

    needs_ground_truth = False

    def __init__(
        self,
        *,
        inter_weight: float = 1.0,
        intra_weight: float = 1.0,
        floor: float = 1e-3,
        weight: Weight = 1.0,
        across_processes: bool = True,
    ):
        super().__init__(weight=weight, across_processes=across_processes)
        if not floor >= 0:
            raise InputError("floor", floor, "a number of at least 0")
        self.inter_weight, self.intra_weight, self.floor = inter_weight, intra_weight, floor

    def setup(self, student: nn.Module, teacher: nn.Module) -> None:
        two_stage = {hasattr(detector, "roi_heads") for detector in (student, teacher)}
        if two_stage == {True}:
            check_softmax_regions(student, teacher, self.class_map)
            return
        check_anchors(student, teacher, self.scale)
        check_shared_classes(student, teacher, self.class_map)
        classes = num_shared_classes(student, self.class_map)
        if classes * max(student.anchor_generator.num_cell_anchors) == 1:
            found = "1 column: a class and an anchor of each cell"
            raise InputError("classes", found, "several, since one value has no correlation")

    def forward(self, student, teacher) -> dict[str, Tensor]:
        if hasattr(student.detector, "roi_heads"):
            stages = zip(student.regions, teacher.regions, strict=True)
            tables = [
                self.region_table(s.pred_class_logits, t.pred_class_logits) for s, t in stages
            ]
        else:
            levels = zip(student.pred_logits, teacher.pred_logits, strict=True)
            anchors = student.detector.anchor_generator.num_cell_anchors
            tables = [self.dense_table(s, t, a) for (s, t), a in zip(levels, anchors)]
        inter, intra = (sum(terms) for terms in zip(*(self.table_terms(*x) for x in tables)))
        return {"inter": self.inter_weight * inter, "intra": self.intra_weight * intra}

    @in_float32
    def region_table(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return P and Q of regions from their logits ``(R, K + 1)``."""
        p, q = student.softmax(dim=1), teacher.softmax(dim=1)
        return (p, q) if self.class_map is None else self.class_map.shared_logits(p, q, True)

    @in_float32
    def dense_table(self, student: Tensor, teacher: Tensor, anchors: int) -> tuple[Tensor, Tensor]:
        """Return P and Q of a level, ``(N * Hi * Wi, A * K)``, from its logits ``(N, Hi * Wi * A, K)``."""
        if self.class_map is not None:
            student, teacher = self.class_map.shared_logits(student, teacher)
        return tuple(x.sigmoid().reshape(-1, anchors * x.shape[-1]) for x in (student, teacher))

    def table_terms(self, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return both unweighted terms of two tables ``(B, M)``."""
        rows, kept_rows = correlation_gaps(p, q, self.floor)
        columns, kept_columns = correlation_gaps(p.T, q.T, self.floor)
        (count,) = self.normalizer(kept_rows.sum())
        return rows.sum() / count, columns.sum() / kept_columns.sum().clamp(min=1)


@in_float32
def correlation_gaps(p: Tensor, q: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Return ``1 - rho`` of each row, 0 for those left out, and which rows are kept, both ``(B,)``.

    Args:
        p, q: ``(B, M)``.
        floor: spread of the teacher's values below which a row is left out; 0: none is, and the denominator has 1e-8 added.

    Example:
        >>> p, q = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 1.0]]), torch.tensor([[1.0, 3.0, 5.0], [2.0, 2.0, 2.0]])
        >>> correlation_gaps(p, q, 1e-3)
        (tensor([0., 0.]), tensor([ True, False]))
    """
    p, q = (x - x.mean(dim=1, keepdim=True) for x in (p, q))
    p_spread, q_spread = (x.norm(dim=1, keepdim=True) for x in (p, q))
    if floor == 0:
        rho = (p * q).sum(dim=1) / ((p_spread * q_spread)[:, 0] + EPSILON)
        return 1 - rho, torch.ones_like(rho, dtype=torch.bool)
    # Of unit vectors, 1 - rho is half of the squared distance, whose gradient is exactly 0 for equal ones. A student's
    # vector below the floor is shorter than 1, so that its gradient is bounded.
    p, q = p / p_spread.clamp(min=floor), q / q_spread.clamp(min=floor)
    kept = q_spread[:, 0] >= floor
    return ((p - q).square().sum(dim=1) / 2).where(kept, 0), kept
