"""Instance-Conditional Knowledge Distillation: features are compared where a decoder attends to detect the objects.

ICD, "Instance-Conditional Knowledge Distillation for Object Detection", NeurIPS 2021. This follows the authors' code
except for two errors there: box sizes in queries are relative to their own image, and priors belong to their class.

Notation: N images, K query slots per image, S cells of all levels, C channels, M heads of d = C / M channels.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torchvision.ops import MLP

from ..layers.adapter import LevelChoice
from ..layers.attention import (
    CellPositions,
    DecoderOutput,
    InstanceDecoderLayer,
    sine_position_embedding,
    split_heads,
    value_projection,
)
from ..layers.masks import boxes_to_mask, pad_boxes
from ..layers.queries import InstanceQueries, descriptor_size, make_queries
from ..structures.class_map import num_classes_of
from ..structures.instance_priors import InstancePriors
from ..utils.errors import InputError
from ..utils.metrics import put_metric
from .base import SeededLoss, Weight, get_weight
from .features import FeatureLoss
from .functional import in_float32, resolve_normalizer

logger = logging.getLogger(__name__)

WEIGHTS = ("attention", "uniform", "box")
NORMALIZERS = ("image", "instance")


class ICDLoss(FeatureLoss, SeededLoss):
    """Distill projected features (values), weighted by the attention of a decoder that detects the objects.

    Each ground-truth object, and about five sampled negatives per object, is a query: its class, a point in it and its
    quantized size (:mod:`d2kd.layers.queries`). A decoder (:mod:`d2kd.layers.attention`) attends to the teacher's
    features and predicts whether the query is a real object, and the distances to its box edges. These auxiliary
    terms train only the decoder. V are values, from the decoder's value projection for the teacher and another
    projection for the student, normalised over the d channels of a head. A are the attention logits of the objects'
    queries.

        identification  mean of BCE over all queries
        localization    1/max(1, n) sum of |l - l^|/w + |t - t^|/h + |r - r^|/w + |b - b^|/h over n objects
        distillation    lambda mean_i mean_m  sum_s a_ims mean_c (V_S - V_T)_imsc^2 / sum_s a_ims,
                        a_ims = sum over the objects of image i of softmax_s(A)

    for images i, heads m, cells s of all levels. Decoder layers are summed in the auxiliary terms and averaged in the
    distillation term. That term is in [0, 4 lambda], and near 2 lambda for uncorrelated features.

    Reads: ``student.features``, ``input_instances``, with ``weights="box"`` also ``gt_instances``;
    ``teacher.features``, ``images``.

    Args:
        levels: level names of the student, or ``{student level: teacher level}``. None: all matching levels, see
            :func:`d2kd.layers.adapter.match_levels`.
        priors: distribution of the negatives: an :class:`InstancePriors`, its JSON file, or None for the same
            frequency and sizes of all classes; see :func:`d2kd.data.priors.estimate_priors`.
        distillation_weight: lambda. None: 3 for two-stage students, 8 for others.
        identification_weight, localization_weight: weights of the auxiliary terms.
        heads, layers: number of attention heads and of layers of the decoder, which has the teacher's channels.
        negatives_per_instance: number of negatives per object.
        max_queries: limit per image, unless it has more objects. None: 100 for two-stage students, 300 for others.
        jitter: maximum offset of a query's point from the box centre, in box widths and heights.
        query_positions: whether queries get position embeddings like the cells', see
            :class:`d2kd.layers.attention.InstanceDecoderLayer`. Not in the paper, whose decoder must learn from the
            descriptor where to attend, which takes many thousands of iterations.
        normalize_keys: whether features are normalised over channels for the attention keys. Not in the paper. It is
            for teachers with levels of very different scale, where the softmax would attend to one level only. Values,
            which are compared, are unchanged.
        aux_warmup: fraction of the run with auxiliary terms only. 0, as published, suits 90k iterations. In runs under
            about 20k iterations the decoder needs about 0.3.
        start: fraction of the run, after ``aux_warmup``, in which the student's features are detached, so
            distillation trains only the student's value projection. The default is 1000 iterations of a 90k schedule.
        weights: "attention"; "uniform", the same weight for every valid cell; or "box", the same weight for every valid
            cell whose centre is in an object's box.
        normalizer: "image", as in the authors' code: images with objects have equal weight, others are 0; or
            "instance", as in the paper: all objects of the batch have equal weight.
        max_attention_mib: memory for the objects' attention, see :func:`d2kd.layers.attention.summed_attention`.
        seed: see :class:`~d2kd.losses.SeededLoss`.
        weight: weight of all terms.
        across_processes: see :class:`~d2kd.losses.DistillLoss`.

    Raises:
        InputError: if an option is invalid. In ``setup``: if heads do not divide the teacher's channels, if channels
            differ between levels, or if the priors have another number of classes. In ``forward``: if an object has
            a class index out of range.

    Example:
        >>> from d2kd.testing import batch, distiller, forward_losses, tiny_retinanet
        >>> losses = forward_losses(distiller(lambda: ICDLoss(heads=2), tiny_retinanet), batch())
        >>> [key.rsplit("_", 1)[1] for key in losses if key.startswith("distill/")]
        ['identification', 'localization', 'distillation']
    """

    needs_ground_truth = True

    def __init__(
        self,
        *,
        levels: LevelChoice = None,
        priors: InstancePriors | str | None = None,
        distillation_weight: Weight | None = None,
        identification_weight: Weight = 1.0,
        localization_weight: Weight = 1.0,
        heads: int = 8,
        layers: int = 1,
        negatives_per_instance: float = 5.0,
        max_queries: int | None = None,
        jitter: float = 0.3,
        query_positions: bool = False,
        normalize_keys: bool = False,
        aux_warmup: float = 0.0,
        start: float = 1000 / 90000,
        weights: str = "attention",
        normalizer: str = "image",
        max_attention_mib: float = 64,
        seed: int = 0,
        weight: Weight = 1.0,
        across_processes: bool = True,
    ):
        super().__init__(
            levels=levels,
            adapter=None,
            normalize=False,
            seed=seed,
            weight=weight,
            across_processes=across_processes,
        )
        for culprit, given, known in (
            ("weights", weights, WEIGHTS),
            ("normalizer", normalizer, NORMALIZERS),
        ):
            if given not in known:
                raise InputError(culprit, given, " or ".join(known))
        for culprit, given, fits, expected in (
            ("layers", layers, layers >= 1, "at least 1"),
            (
                "negatives_per_instance",
                negatives_per_instance,
                negatives_per_instance >= 0,
                "0 or more",
            ),
            ("max_queries", max_queries, max_queries is None or max_queries >= 1, "at least 1"),
            ("jitter", jitter, 0 <= jitter < 0.5, "from 0 to less than 0.5, to stay in the box"),
            ("aux_warmup", aux_warmup, 0 <= aux_warmup < 1, "a fraction of the run, less than 1"),
            ("start", start, 0 <= start < 1 - aux_warmup, "a fraction of what aux_warmup leaves"),
        ):
            if not fits:
                raise InputError(culprit, given, expected)
        self.priors = InstancePriors.load(priors) if isinstance(priors, str) else priors
        self.distillation_weight = distillation_weight
        self.identification_weight = identification_weight
        self.localization_weight = localization_weight
        self.heads, self.layers = heads, layers
        self.negatives_per_instance, self.max_queries, self.jitter = (
            negatives_per_instance,
            max_queries,
            jitter,
        )
        self.query_positions, self.normalize_keys = query_positions, normalize_keys
        self.aux_warmup, self.distill_start = aux_warmup, aux_warmup + start
        self.milestones = aux_warmup, self.distill_start
        self.weights, self.normalize_by = weights, normalizer
        self.max_attention_mib = max_attention_mib
        self._before_distill = False

    def setup(self, student: nn.Module, teacher: nn.Module) -> None:
        super().setup(student, teacher)
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
        """Create the trained modules.

        Args:
            num_classes: number of ground-truth classes.
            student_channels, channels: channels of the student's and the teacher's features.
            hidden: hidden units of the decoder's MLPs, see :class:`InstanceDecoderLayer`.
        """
        if self.priors is None:
            logger.warning("no priors given: all classes have the same frequency and sizes")
            self.priors = InstancePriors.uniform(num_classes)
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
        # The student needs no decoder, only value projections.
        self.student_values = nn.ModuleList(
            value_projection(student_channels, channels) for _ in range(self.layers)
        )

    def make_identity(self) -> None:
        """Use one value projection for both sides and no auxiliary terms, so equal detectors have a loss of 0."""
        for student_value, layer in zip(self.student_values, self.decoder, strict=True):
            student_value.load_state_dict(layer.value.state_dict())
        self.identification_weight = self.localization_weight = 0.0

    def forward(self, student, teacher) -> dict[str, Tensor]:
        queries = make_queries(
            student.input_instances,
            self.priors,
            negatives_per_instance=self.negatives_per_instance,
            max_queries=self.max_queries,
            jitter=self.jitter,
            generator=self.generator(),
        )
        s_maps, t_maps = zip(*self.map_pairs(student, teacher).values())
        valid = list(self.valid_cells(student, teacher).values())
        compared = None
        if self.weights == "box":
            boxes = pad_boxes([x.gt_boxes.tensor for x in student.gt_instances])
            inside = [
                mask & boxes_to_mask(boxes, tuple(mask.shape[-2:]), stride, "box").bool()
                for mask, stride in zip(valid, self.strides.values(), strict=True)
            ]
            compared = torch.cat([x.flatten(1) for x in inside], dim=1)
        layer_losses = self.run_decoder(
            None if self.progress < self.aux_warmup else flatten_maps(s_maps),
            flatten_maps(t_maps),
            torch.cat([x.flatten(1) for x in valid], dim=1),
            CellPositions.from_masks(valid, t_maps[0].shape[1]),
            queries,
            compared,
        )
        self._log_metrics(layer_losses, queries)
        return self.weighted_terms(layer_losses)

    @in_float32
    def run_decoder(
        self,
        student: Tensor | None,
        teacher: Tensor,
        valid: Tensor,
        positions: CellPositions,
        queries: InstanceQueries,
        compared: Tensor | None = None,
    ) -> list[DecoderLayerLosses]:
        """Run the decoder and return the losses of each of its layers.

        Args:
            student, teacher: ``(N, S, C)``, features of all cells, each with its own C. Without a student there is no
                distillation. Before distillation starts, the student gets no gradient.
            valid: ``(N, S)`` bool, cells that the image covers.
            positions: positions of these cells, with the teacher's C.
            queries: K slots per image; best on the CPU, where ``is_positive`` is read without synchronization.
            compared: ``(N, S)`` bool, cells with equal weights unless weights are the attention. Default: ``valid``.
        """
        if student is not None and self.progress < self.distill_start:
            student = student.detach()
        use_attention = student is not None and self.weights == "attention"
        compared = valid if compared is None else compared
        query_mask = queries.is_positive if use_attention else None
        queries = queries.to(teacher.device)
        used, real, images = self.normalizer(
            queries.is_used.sum(),
            queries.is_positive.sum(),
            valid.new_full((), len(valid), dtype=torch.float32),
        )
        x, query_positions = self.encode_queries(queries)
        layer_losses = []
        for layer, student_value in zip(self.decoder, self.student_values):
            decoded = layer(
                x, teacher, positions, valid, query_mask, self.max_attention_mib, query_positions
            )
            logits = self.auxiliary_head(decoded.queries)
            losses = DecoderLayerLosses(
                decoded,
                identification_loss(logits[..., 0], queries.is_positive, queries.is_used, used),
                localization_loss(
                    logits[..., 1:], queries.edge_distances, queries.is_positive, real
                ),
            )
            if student is not None:
                if use_attention:
                    weights = decoded.attention
                else:  # summed over the objects of an image, as attention is; 0 for an image without objects
                    objects = queries.is_positive.sum(-1)[:, None, None]
                    weights = objects * compared[:, None]
                    weights = weights / compared.sum(-1).clamp(min=1)[:, None, None]
                    weights = weights.expand(-1, self.heads, -1)
                if self.normalize_by == "instance":
                    (total,) = self.normalizer(weights.float().sum(), min_total=1e-6)
                else:
                    total = images * self.heads
                values = split_heads(student_value(student), self.heads)
                losses.distance = value_distance(
                    values, decoded.values.detach(), weights, self.normalize_by, total
                )
            layer_losses.append(losses)
            x = decoded.queries
        return layer_losses

    def encode_queries(self, queries: InstanceQueries) -> tuple[Tensor, Tensor | None]:
        """Return query embeddings ``(N, K, C)`` and, if queries have positions, their embeddings ``(N, K, C)``."""
        embeddings = self.query_encoder(queries.descriptors)
        if not self.query_positions:
            return embeddings, None
        return embeddings, sine_position_embedding(queries.centers, embeddings.shape[-1])

    def weighted_terms(self, layers: list[DecoderLayerLosses]) -> dict[str, Tensor]:
        """Return the weighted terms by name, without those of weight 0."""
        terms = {
            "identification": (self.identification_weight, sum(x.identification for x in layers)),
            "localization": (self.localization_weight, sum(x.localization for x in layers)),
        }
        if layers[0].distance is not None:
            distance = sum(x.distance for x in layers) / len(layers)
            terms["distillation"] = (self.distillation_weight, distance)
        weighted = {
            name: (get_weight(weight, self.progress), term)
            for name, (weight, term) in terms.items()
        }
        return {name: weight * term for name, (weight, term) in weighted.items() if weight}

    def _log_metrics(self, layers: list[DecoderLayerLosses], queries: InstanceQueries) -> None:
        """Log scalars that show whether the decoder uses the teacher's features; warn once if it does not."""

        def mean(values: list[Tensor]) -> Tensor:
            return torch.stack(values).detach().mean()

        # Losses possible without the teacher's features: a constant probability, the fraction of real objects; and
        # the exact size of every box, but not the position of the jittered point in it.
        real = float(queries.is_positive.sum() / queries.is_used.sum())
        identification_baseline = -sum(p * math.log(p) for p in (real, 1 - real) if p > 0)
        localization_baseline = 2 * self.jitter * (real > 0)
        values = {}
        if identification_baseline:
            loss = mean([x.identification for x in layers])
            values[IDENTIFICATION] = loss / identification_baseline
        if localization_baseline:
            values[LOCALIZATION] = mean([x.localization for x in layers]) / localization_baseline
        if layers[0].distance is not None:
            values[DISTANCE] = mean([x.distance for x in layers])
            if real and layers[0].decoded.entropy is not None:
                values[ENTROPY] = mean([x.decoded.entropy for x in layers])
        for key, value in values.items():
            put_metric(key, value)

        if self.progress < self.distill_start or self.num_forwards == 1:
            self._before_distill = True
        if self._before_distill and self.progress >= self.distill_start:
            self._before_distill = False
            storage = get_event_storage()
            found = {
                key: storage.history(key).median(WINDOW)
                for key in (IDENTIFICATION, LOCALIZATION)
                if key in storage.histories()
            }
            if any(not value < 1 for value in found.values()):
                logger.warning(
                    "distillation begins before the decoder has learned to read the teacher (%s; values "
                    "below 1 are expected): increase aux_warmup or start",
                    ", ".join(f"{key} {value:.2f}" for key, value in found.items()),
                )


IDENTIFICATION = "distill/icd_identification"
"""Scalar: identification loss / entropy of the fraction of real objects; below 1 once the decoder has learned."""
LOCALIZATION = "distill/icd_localization"
"""Scalar: localization loss / (2 jitter); below 1 only if the decoder uses the teacher's features."""
ENTROPY = "distill/icd_attention_entropy"
"""Scalar: entropy of the attention / entropy of uniform attention; near 1 before training."""
DISTANCE = "distill/icd_value_distance"
"""Scalar: distillation term without its weight; near 2 for uncorrelated values."""
WINDOW = 20
"""Number of iterations of the median in the warning."""


@dataclass
class DecoderLayerLosses:
    """Output and losses of one decoder layer.

    Attributes:
        decoded: output of the layer.
        identification, localization: unweighted auxiliary losses.
        distance: unweighted distillation term, see :func:`value_distance`; None without a student.
    """

    decoded: DecoderOutput
    identification: Tensor
    localization: Tensor
    distance: Tensor | None = None


def flatten_maps(maps: Iterable[Tensor]) -> Tensor:
    """Flatten and concatenate feature maps: ``(N, C, Hi, Wi)`` of each level to ``(N, sum Hi * Wi, C)``."""
    return torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)


@in_float32
def identification_loss(
    logits: Tensor, is_positive: Tensor, is_used: Tensor, normalizer: Tensor | None = None
) -> Tensor:
    """Return the binary cross-entropy of ``is_positive``, averaged over the used slots.

    Args:
        logits, is_positive, is_used: ``(N, K)``.
        normalizer: replaces the number of used slots.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, is_positive.to(logits), reduction="none")
    return (entropy * is_used).sum() / resolve_normalizer(is_used.sum(), normalizer)


@in_float32
def localization_loss(
    logits: Tensor, edge_distances: Tensor, is_positive: Tensor, normalizer: Tensor | None = None
) -> Tensor:
    """Return the L1 errors of the four edge distances, in box widths and heights, summed and averaged over objects.

    Args:
        logits: ``(N, K, 4)``, before the sigmoid.
        edge_distances: ``(N, K, 4)``, to the left, top, right and bottom, as fractions of image width and height.
        is_positive: ``(N, K)``.
        normalizer: replaces the number of objects.
    """
    sides = (edge_distances[..., :2] + edge_distances[..., 2:]).clamp(min=1e-7)
    error = (logits.sigmoid() - edge_distances).abs().unflatten(-1, (2, 2)) / sides[..., None, :]
    return (error.sum(dim=(-1, -2)) * is_positive).sum() / resolve_normalizer(
        is_positive.sum(), normalizer
    )


@in_float32
def value_distance(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    normalize_by: str = "image",
    normalizer: Tensor | None = None,
) -> Tensor:
    """Return the weighted squared distance of values, each normalised over the channels of its head.

    In each cell this is 2 (1 - rho), rho the Pearson correlation of the two vectors; its range is [0, 4].

    Args:
        student, teacher: ``(N, M, S, d)``.
        weights: ``(N, M or 1, S)``, not negative. An image with zero weights contributes 0.
        normalize_by: "image", the average of the weighted mean of each image and head; or "instance", one weighted
            mean over all.
        normalizer: replaces the number of images times heads, or the sum of all weights.
    """
    # With heads after cells, as in memory, layer_norm makes no copy. mse_loss is one operation, and the gradient of
    # sum(), unlike that of mean(), is expanded without a copy.
    s, t = (F.layer_norm(x.transpose(1, 2), x.shape[-1:]) for x in (student, teacher))
    cells = F.mse_loss(s, t, reduction="none").sum(dim=-1).transpose(1, 2)
    cells = cells / student.shape[-1]
    weights = weights.expand_as(cells)
    distance, total = (cells * weights).sum(dim=-1), weights.sum(dim=-1)
    if normalize_by == "instance":
        total = total.sum().clamp(min=1e-6) if normalizer is None else normalizer
        return distance.sum() / total
    means = distance / total.clamp(min=1e-6)
    return means.mean() if normalizer is None else means.sum() / normalizer


def _width(side: str, backbone: nn.Module, levels: Iterable[str]) -> int:
    """Return the number of channels, which must be the same for all levels."""
    shapes = backbone.output_shape()
    widths = {level: shapes[level].channels for level in levels}
    if len(set(widths.values())) > 1:
        found = ", ".join(f"{level} has {width} channels" for level, width in widths.items())
        raise InputError("levels", f"the {side}'s {found}", "one width, as of a feature pyramid")
    return next(iter(widths.values()))
