"""Instance-Conditional Knowledge Distillation: features count where they tell about the objects.

ICD, "Instance-Conditional Knowledge Distillation for Object Detection", NeurIPS 2021. Follows the authors'
published code, less its faults: sides are told with each image's own size, and the priors are those of the
classes they are for.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torchvision.ops import MLP

from ..layers.adapter import match_levels
from ..layers.attention import (
    CellPositions,
    Decoded,
    InstanceDecoderLayer,
    by_head,
    point_positions,
    value_projection,
)
from ..layers.masks import pad_boxes, paint, valid_cells
from ..layers.queries import InstanceQueries, descriptor_size, make_queries
from ..structures.class_map import num_classes_of
from ..structures.instance_priors import InstancePriors
from ..utils.errors import InputError
from .base import DistillLoss, Weight, value_of
from .functional import at_least_one, in_float32

logger = logging.getLogger(__name__)

WEIGHTS = ("attention", "uniform", "box")
NORMALIZERS = ("image", "instance")


class ICDLoss(DistillLoss):
    """Values of teacher and student, compared where a decoder looks to recognise the objects.

    Every object of the ground truth, and some five fakes for each, is a question that names its class, a
    point in it and its rough size (:mod:`d2kd.layers.queries`). A decoder reads the teacher's features to
    answer it (:mod:`d2kd.layers.attention`): is it real, and where are its edges? These auxiliary terms train
    the decoder alone. With V of its value projection for the teacher and of another for the student,
    normalised over the d channels of a head, and A the attention of the real objects' questions,

        identification  mean of BCE over all questions
        localization    1/max(1, n) sum of |l - l^|/w + |t - t^|/h + |r - r^|/w + |b - b^|/h over n objects
        distillation    lambda mean_i mean_m  sum_s a_ims mean_c (V_S - V_T)_imsc^2 / sum_s a_ims,
                        a_ims = sum over the objects of image i of softmax_s(A)

    for images i, heads m, cells s of all levels. Layers add up in the auxiliary terms and are averaged in the
    distillation, which lies in [0, 4 lambda], near 2 lambda for features that have nothing in common.

    Reads: ``student.features``, ``gt_instances``; ``teacher.features``, ``images``.

    Args:
        levels: level names of the student; None: all that match, see :func:`d2kd.layers.adapter.match_levels`.
        priors: what fakes are drawn from: an :class:`InstancePriors`, its JSON file, or None for uniform
            classes and sides; see :func:`d2kd.data.priors.estimate_priors`.
        distillation_weight: lambda; None: 3 for two-stage students, 8 for others.
        identification_weight, localization_weight: of the auxiliary terms.
        heads, layers: of the decoder, which has the teacher's width.
        fakes_per_object: how many fakes an object brings.
        max_queries: of an image, unless it has more objects; None: 100 for two-stage students, 300 for others.
        jitter: how far the told point is from the centre, at most, in widths and heights of the box.
        query_positions: whether a query knows from the start where its point is, as cells know where they are;
            ours, see :class:`d2kd.layers.attention.InstanceDecoderLayer`. As published, the decoder must learn
            from the descriptor where to look, which takes many thousands of iterations.
        normalize_keys: whether cells are looked for by their features normalised over channels; ours, for
            teachers whose levels differ much in scale, of which a softmax sees the largest alone. What is read
            there, and compared, stays as it is.
        aux_warmup: fraction of the run in which the auxiliary terms are alone. The published counts suit
            90k iterations; of a run under 20k or so the decoder needs some 0.3.
        start: fraction of the run, after that, in which distillation trains the student's value projection
            alone: the student's features are detached. 1000 iterations of a 90k schedule.
        weights: "attention"; "uniform": every valid cell of an image counts the same; or "box": those whose centre
            is in an object's box do, and no other.
        normalizer: "image", as the authors' code: an image with few objects counts as much as a crowded one,
            and one without any counts as 0; or "instance", as the paper: every object of the batch counts the
            same.
        attention_mebibytes: memory for the objects' attention, see :func:`d2kd.layers.attention.summed_attention`.
        seed: of the loss's own generator, which leaves all others alone; its place in the sequence is part
            of ``state_dict()``. Negative: drawn anew, as ``train.seed``.
        weight: of all terms together.
        across_processes: see :class:`~d2kd.losses.DistillLoss`.

    Raises:
        InputError: an option is none of these; on ``bind`` heads that do not divide the teacher's width, levels
            of unequal width, priors of another number of classes; in a step an object of no such class.
    """

    def __init__(
        self,
        *,
        levels: Sequence[str] | None = None,
        priors: InstancePriors | str | None = None,
        distillation_weight: Weight | None = None,
        identification_weight: Weight = 1.0,
        localization_weight: Weight = 1.0,
        heads: int = 8,
        layers: int = 1,
        fakes_per_object: float = 5.0,
        max_queries: int | None = None,
        jitter: float = 0.3,
        query_positions: bool = False,
        normalize_keys: bool = False,
        aux_warmup: float = 0.0,
        start: float = 1000 / 90000,
        weights: str = "attention",
        normalizer: str = "image",
        attention_mebibytes: float = 64,
        seed: int = 0,
        weight: Weight = 1.0,
        across_processes: bool = True,
    ):
        super().__init__(weight=weight, across_processes=across_processes)
        for culprit, given, known in (
            ("weights", weights, WEIGHTS),
            ("normalizer", normalizer, NORMALIZERS),
        ):
            if given not in known:
                raise InputError(culprit, given, " or ".join(known))
        for culprit, given, fits, expected in (
            ("layers", layers, layers >= 1, "at least 1"),
            ("fakes_per_object", fakes_per_object, fakes_per_object >= 0, "0 or more"),
            ("max_queries", max_queries, max_queries is None or max_queries >= 1, "at least 1"),
            ("jitter", jitter, 0 <= jitter < 0.5, "from 0 to less than 0.5, to stay in the box"),
            ("aux_warmup", aux_warmup, 0 <= aux_warmup < 1, "a fraction of the run, less than 1"),
            ("start", start, 0 <= start < 1 - aux_warmup, "a fraction of what aux_warmup leaves"),
        ):
            if not fits:
                raise InputError(culprit, given, expected)
        self.wanted = None if levels is None else list(levels)
        self.priors = InstancePriors.load(priors) if isinstance(priors, str) else priors
        self.distillation_weight = distillation_weight
        self.identification_weight = identification_weight
        self.localization_weight = localization_weight
        self.heads, self.layers = heads, layers
        self.fakes_per_object, self.max_queries, self.jitter = fakes_per_object, max_queries, jitter
        self.query_positions, self.normalize_keys = query_positions, normalize_keys
        self.aux_warmup, self.begin = aux_warmup, aux_warmup + start
        self.changes = aux_warmup, self.begin
        self.weights, self.normalize_by = weights, normalizer
        self.attention_mebibytes = attention_mebibytes
        self.seed = seed if seed >= 0 else secrets.randbits(31)
        self.draws = 0  # under this seed
        self._waits = False

    def bind(self, student: nn.Module, teacher: nn.Module) -> None:
        self.levels = match_levels(student.backbone, teacher.backbone, self.wanted, self.scale)
        shapes = student.backbone.output_shape()
        self.strides = {level: shapes[level].stride for level in self.levels}
        two_stage = hasattr(student, "roi_heads")
        if self.distillation_weight is None:
            self.distillation_weight = 3.0 if two_stage else 8.0
        if self.max_queries is None:
            self.max_queries = 100 if two_stage else 300
        self.build(
            num_classes_of(student),
            _width("student", student.backbone, self.levels),
            _width("teacher", teacher.backbone, self.levels.values()),
        )

    def build(
        self, num_classes: int, student_channels: int, channels: int, hidden: int | None = None
    ) -> None:
        """Make what is trained, for classes of the ground truth and widths of both sides' features.

        Args:
            hidden: of the decoder's perceptrons, see :class:`InstanceDecoderLayer`.
        """
        if self.priors is None:
            logger.warning("no priors given: fakes are of any class and size alike")
            self.priors = InstancePriors.unknown(num_classes)
        if self.priors.num_classes != num_classes:
            found = f"of {self.priors.num_classes} classes"
            raise InputError("priors", found, f"{num_classes}, the student's classes")
        self.query_encoder = MLP(descriptor_size(num_classes), [channels] * 3)
        self.decoder = nn.ModuleList(
            InstanceDecoderLayer(
                channels,
                self.heads,
                hidden,
                query_positions=self.query_positions,
                normalize_keys=self.normalize_keys,
            )
            for _ in range(self.layers)
        )
        self.auxiliary_head = MLP(channels, [channels, channels, 5])
        # Of a decoder of the student's own nothing else would ever be used.
        self.student_values = nn.ModuleList(
            value_projection(student_channels, channels) for _ in range(self.layers)
        )

    def make_identity(self) -> None:
        """Compare with one projection for both, without what trains the decoder: tests of a copy's silence."""
        for ours, layer in zip(self.student_values, self.decoder, strict=True):
            ours.load_state_dict(layer.value.state_dict())
        self.identification_weight = self.localization_weight = 0.0

    def forward(self, student, teacher) -> dict[str, Tensor]:
        queries = make_queries(
            student.gt_instances,
            self.priors,
            fakes_per_object=self.fakes_per_object,
            max_queries=self.max_queries,
            jitter=self.jitter,
            generator=self._generator(),
        )
        images = teacher.images
        sizes = [teacher.features[match].shape[-2:] for match in self.levels.values()]
        device = images.tensor.device
        covering = valid_cells(images.image_sizes, images.tensor.shape[-2:], sizes, device)
        ours, theirs, valid = [], [], []
        for (level, match), covered in zip(self.levels.items(), covering, strict=True):
            one, other = student.features[level], teacher.features[match]
            # Detectors that pad to other multiples differ only below and to the right of the images.
            h, w = (min(a, b) for a, b in zip(one.shape[-2:], other.shape[-2:]))
            ours.append(one[..., :h, :w])
            theirs.append(other[..., :h, :w])
            valid.append(covered[:, :h, :w])
        counted = None
        if self.weights == "box":
            boxes = pad_boxes([x.gt_boxes.tensor for x in student.gt_instances])
            inside = [
                of_level & paint(boxes, tuple(of_level.shape[-2:]), stride, "box").bool()
                for of_level, stride in zip(valid, self.strides.values(), strict=True)
            ]
            counted = torch.cat([x.flatten(1) for x in inside], dim=1)
        readings = self.read(
            None if self.progress < self.aux_warmup else tokens(ours),
            tokens(theirs),
            torch.cat([x.flatten(1) for x in valid], dim=1),
            CellPositions.of(valid, other.shape[1]),
            queries,
            counted,
        )
        self._watch(readings, queries)
        return self.terms(readings)

    @in_float32
    def read(
        self,
        student: Tensor | None,
        teacher: Tensor,
        valid: Tensor,
        positions: CellPositions,
        queries: InstanceQueries,
        counted: Tensor | None = None,
    ) -> list[Reading]:
        """What each layer of the decoder makes of one batch.

        Args:
            student, teacher: ``(N, S, C)`` of either's width, cells of all levels; no student, no distance.
                Before distillation begins the student receives no gradient.
            valid: ``(N, S)`` bool, which cells are of the image.
            positions: of these cells, as long as the teacher's width.
            queries: for K slots of each image; best on the CPU, whence which of them are real is read.
            counted: ``(N, S)`` bool, which cells are compared, all alike, unless attention weighs them; the valid
                ones by default.
        """
        if student is not None and self.progress < self.begin:
            student = student.detach()
        attends = student is not None and self.weights == "attention"
        counted = valid if counted is None else counted
        chosen, queries = queries.is_real, queries.to(teacher.device)
        used, real, images = self.normalizer(
            queries.is_used.sum(),
            queries.is_real.sum(),
            valid.new_full((), len(valid), dtype=torch.float32),
        )
        asked, places = self.encoded(queries)
        readings = []
        for layer, student_value in zip(self.decoder, self.student_values):
            decoded = layer(
                asked,
                teacher,
                positions,
                valid,
                chosen if attends else None,
                self.attention_mebibytes,
                places,
            )
            answers = self.auxiliary_head(decoded.queries)
            reading = Reading(
                decoded,
                identification_loss(answers[..., 0], queries.is_real, queries.is_used, used),
                localization_loss(answers[..., 1:], queries.edge_distances, queries.is_real, real),
            )
            if student is not None:
                if attends:
                    weights = decoded.attention
                else:  # summed over the objects of an image, as attention is: without any it counts as 0
                    objects = queries.is_real.sum(-1)[:, None, None]
                    weights = objects * counted[:, None]
                    weights = weights / counted.sum(-1).clamp(min=1)[:, None, None]
                    weights = weights.expand(-1, self.heads, -1)
                if self.normalize_by == "instance":
                    (total,) = self.normalizer(weights.float().sum(), least=1e-6)
                else:
                    total = images * self.heads
                reading.distance = value_distance(
                    by_head(student_value(student), self.heads),
                    decoded.values.detach(),
                    weights,
                    self.normalize_by,
                    total,
                )
            readings.append(reading)
            asked = decoded.queries
        return readings

    def encoded(self, queries: InstanceQueries) -> tuple[Tensor, Tensor | None]:
        """What the decoder is asked: ``(N, K, C)``, and its positions ``(N, K, C)`` if queries have any."""
        asked = self.query_encoder(queries.descriptors)
        if not self.query_positions:
            return asked, None
        return asked, point_positions(queries.centers, asked.shape[-1])

    def terms(self, readings: list[Reading]) -> dict[str, Tensor]:
        """Weighted terms by name; those that are off are left out."""
        terms = {
            "identification": (
                self.identification_weight,
                sum(reading.identification for reading in readings),
            ),
            "localization": (
                self.localization_weight,
                sum(reading.localization for reading in readings),
            ),
        }
        if readings[0].distance is not None:
            distance = sum(reading.distance for reading in readings) / len(readings)
            terms["distillation"] = (self.distillation_weight, distance)
        weighted = {
            name: (value_of(weight, self.progress), term) for name, (weight, term) in terms.items()
        }
        return {name: weight * term for name, (weight, term) in weighted.items() if weight}

    # Not buffers, for which in each step a GPU would have to be waited.
    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.draws, self.seed])

    def set_extra_state(self, state: Tensor) -> None:
        self.draws, self.seed = (int(number) for number in state)

    def _generator(self) -> torch.Generator:
        """The generator of this step, told by the seed, the process and how many steps there were.

        One number in the checkpoint, equal in all processes, so brings each of them back to its place.
        """
        key = (self.seed, comm.get_rank(), self.draws)
        self.draws += 1
        (word,) = np.random.SeedSequence(key).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(word) >> 1)

    def _watch(self, readings: list[Reading], queries: InstanceQueries) -> None:
        """Record what tells whether the decoder reads the teacher at all, and warn once where it does not."""

        def mean(values: list[Tensor]) -> Tensor:
            return torch.stack(values).detach().mean()

        # What can be had without a look at the teacher: by guessing as often as there are objects, and by
        # knowing the exact size of every box, but not where in it the told point is.
        real = float(queries.is_real.sum() / queries.is_used.sum())
        guess = -sum(p * math.log(p) for p in (real, 1 - real) if p > 0)
        blind = 2 * self.jitter * (real > 0)
        values = {}
        if guess:
            values[IDENTIFICATION] = mean([x.identification for x in readings]) / guess
        if blind:
            values[LOCALIZATION] = mean([x.localization for x in readings]) / blind
        if readings[0].distance is not None:
            values[DISTANCE] = mean([x.distance for x in readings])
            if real and readings[0].decoded.entropy is not None:
                values[ENTROPY] = mean([x.decoded.entropy for x in readings])
        storage = get_event_storage()
        if values:
            for key, value in zip(values, torch.stack(list(values.values())).tolist()):
                storage.put_scalar(key, value)

        if self.progress < self.begin or self.draws == 1:
            self._waits = True
        if self._waits and self.progress >= self.begin:
            self._waits = False
            found = {
                key: storage.history(key).median(WINDOW)
                for key in (IDENTIFICATION, LOCALIZATION)
                if key in storage.histories()
            }
            if any(not value < 1 for value in found.values()):
                logger.warning(
                    "distillation begins before the decoder has learned to read the teacher (%s; below 1 "
                    "it has): lengthen aux_warmup or start",
                    ", ".join(f"{key} {value:.2f}" for key, value in found.items()),
                )


IDENTIFICATION = "distill/icd_identification"
"""Scalar: the identification loss by the entropy of the share of real questions; below 1 once learned."""
LOCALIZATION = "distill/icd_localization"
"""Scalar: the localization loss by 2 jitter; below 1 only if the teacher's features are read."""
ENTROPY = "distill/icd_attention_entropy"
"""Scalar: the attention's entropy by that of even attention; near 1 while nothing is found."""
DISTANCE = "distill/icd_value_distance"
"""Scalar: the distillation term without its weight, near 2 where values have nothing in common."""
WINDOW = 20
"""Iterations over which the warning takes the median."""


@dataclass
class Reading:
    """What one layer of the decoder made of a batch.

    Attributes:
        decoded: its output.
        identification, localization: scalars that train the decoder.
        distance: of the student's values from the teacher's, see :func:`value_distance`; None without a
            student.
    """

    decoded: Decoded
    identification: Tensor
    localization: Tensor
    distance: Tensor | None = None


def tokens(maps: Iterable[Tensor]) -> Tensor:
    """``(N, C, Hi, Wi)`` of each level to ``(N, sum Hi * Wi, C)``, levels in their order."""
    return torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)


@in_float32
def identification_loss(
    logits: Tensor, is_real: Tensor, is_used: Tensor, normalizer: Tensor | None = None
) -> Tensor:
    """Binary cross-entropy of being real, on average over the used slots; all ``(N, K)``.

    A normalizer stands in place of their number.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, is_real.to(logits), reduction="none")
    return (entropy * is_used).sum() / at_least_one(is_used.sum(), normalizer)


@in_float32
def localization_loss(
    logits: Tensor, edge_distances: Tensor, is_real: Tensor, normalizer: Tensor | None = None
) -> Tensor:
    """Distances to the four edges, each in widths or heights of the box, summed; on average over real slots.

    Args:
        logits: ``(N, K, 4)``, before the sigmoid.
        edge_distances: ``(N, K, 4)``, to the left, top, right and bottom, as parts of the image's sides.
        is_real: ``(N, K)``.
        normalizer: in place of the number of real slots.
    """
    sides = (edge_distances[..., :2] + edge_distances[..., 2:]).clamp(min=1e-7)
    error = (logits.sigmoid() - edge_distances).abs().unflatten(-1, (2, 2)) / sides[..., None, :]
    return (error.sum(dim=(-1, -2)) * is_real).sum() / at_least_one(is_real.sum(), normalizer)


@in_float32
def value_distance(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    normalize_by: str = "image",
    normalizer: Tensor | None = None,
) -> Tensor:
    """Weighted squared distance of values, each normalised over its head's channels.

    Per cell that is 2 (1 - rho), rho the Pearson correlation of the two vectors: from 0 to 4.

    Args:
        student, teacher: ``(N, M, S, d)``.
        weights: ``(N, M or 1, S)``, not negative; all 0 in an image that counts as 0.
        normalize_by: "image": weighted means of images and heads, averaged; "instance": one weighted mean of
            all.
        normalizer: in place of the number of images and heads, or of the sum of all weights.
    """
    # Heads behind cells, as they lie in memory: normalising copies nothing. One operation squares the difference,
    # and a sum's gradient, unlike a mean's, is not written out.
    ours, theirs = (F.layer_norm(x.transpose(1, 2), x.shape[-1:]) for x in (student, teacher))
    cells = F.mse_loss(ours, theirs, reduction="none").sum(dim=-1).transpose(1, 2)
    cells = cells / student.shape[-1]
    weights = weights.expand_as(cells)
    distance, total = (cells * weights).sum(dim=-1), weights.sum(dim=-1)
    if normalize_by == "instance":
        total = total.sum().clamp(min=1e-6) if normalizer is None else normalizer
        return distance.sum() / total
    means = distance / total.clamp(min=1e-6)
    return means.mean() if normalizer is None else means.sum() / normalizer


def _width(side: str, backbone: nn.Module, levels: Iterable[str]) -> int:
    """The channels that all of the levels have."""
    shapes = backbone.output_shape()
    widths = {level: shapes[level].channels for level in levels}
    if len(set(widths.values())) > 1:
        found = ", ".join(f"{level} has {width} channels" for level, width in widths.items())
        raise InputError("levels", f"the {side}'s {found}", "one width, as of a feature pyramid")
    return next(iter(widths.values()))
