"""The base class of losses between the predictions of two dense detectors with equal anchors.

Notation: N images, R anchors of all levels, K classes that both detectors have.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.structures import Boxes
from torch import Tensor, nn

from ..modeling.anchors import check_anchors
from ..structures.class_map import check_shared_classes
from ..utils.errors import InputError
from .base import DistillLoss


class DenseLoss(DistillLoss):
    """Base class of losses between dense predictions, whose rows correspond because the anchors are equal.

    Raises:
        InputError: in ``setup``, if the detectors are not dense or their anchors differ, if they have no class in
            common, or if classes differ and their names were not given.
    """

    def setup(self, student: nn.Module, teacher: nn.Module) -> None:
        check_anchors(student, teacher, self.scale)
        check_shared_classes(student, teacher, self.class_map)

    def shared_classes(self, x: Tensor, side: str) -> Tensor:
        """Return the entries of the shared classes, ``(…, K)``, in float32.

        Args:
            x: ``(…, classes of that side)``, one entry for each class.
            side: whose classes they are, "student" or "teacher".
        """
        x = x.float()
        return x if self.class_map is None else self.class_map.select(x, side)

    def logits(self, student, teacher) -> tuple[Tensor, Tensor]:
        """Return both sides' class logits of the shared classes, ``(N, R, K)`` each."""
        return (
            self.shared_classes(torch.cat(student.pred_logits, dim=1), "student"),
            self.shared_classes(torch.cat(teacher.pred_logits, dim=1), "teacher"),
        )

    def labels(self, student) -> Tensor:
        """Return the student's labels ``(N, R)`` in ``{-1, 0, …, K}``: K background, -1 an anchor that does not count.

        These are the ignored ones, and those of objects of a class that the teacher lacks.
        """
        labels = student.gt_labels
        return labels if self.class_map is None else self.class_map.map_labels(labels)

    def known_labels(self, student, teacher) -> Tensor:
        """Return :meth:`labels`, or of unlabelled images the teacher's, see :func:`labels_of`: ``(N, R)``."""
        if student.is_labelled:
            return self.labels(student)
        return labels_of(self.shared_classes(torch.cat(teacher.pred_logits, dim=1), "teacher"))


def decode_boxes(
    detector: nn.Module, deltas: Tensor, anchors: list[Boxes], at_origin: bool = False
) -> Tensor:
    """Return the boxes ``(N, R, 4)``, XYXY in pixels, of deltas ``(N, R, 4)`` in the detector's box coder.

    Args:
        anchors: boxes of each level.
        at_origin: whether every anchor is moved to the origin. Boxes of one anchor that are compared with each other
            then have less rounding errors.
    """
    boxes = Boxes.cat(anchors)
    reference = boxes.tensor
    if at_origin:
        reference = reference - boxes.get_centers().repeat(1, 2)
    # Box coders need float32.
    decoded = detector.box2box_transform.apply_deltas(
        deltas.float().flatten(0, 1), reference.repeat(len(deltas), 1)
    )
    return decoded.view_as(deltas)


def labels_of(logits: Tensor) -> Tensor:
    """Return the most probable class of each anchor; K, background, where no class's probability is above 1/2.

    In published methods labels come from ground truth alone. That these take their place in unlabelled images is this
    project's choice.

    Args:
        logits: ``(…, K)``, before the sigmoid.
    """
    highest, labels = logits.max(dim=-1)
    return labels.where(highest > 0, logits.shape[-1])


def positives_per_image(positive: Tensor) -> Tensor:
    """Return the number of positives ``(N, R)``, at least one for each image, as GFL counts them: a scalar."""
    return positive.sum(dim=1).clamp(min=1).sum()


@dataclass(frozen=True)
class Tower:
    """A tower of a dense head: blocks of a convolution, perhaps a norm, and a ReLU.

    Attributes:
        name: of the tower in the head.
        relus: position of each block's ReLU.
        channels: number of channels of the input, and after each block.
        levels: names of the head's input features.
    """

    name: str
    relus: tuple[int, ...]
    channels: tuple[int, ...]
    levels: tuple[str, ...]

    @property
    def blocks(self) -> int:
        return len(self.relus)

    def start(self, blocks: int) -> int:
        """Return the position of the first layer after a number of blocks without the last one's ReLU."""
        return self.relus[blocks - 1] if blocks else 0

    def rest(self, head: nn.Module, blocks: int) -> nn.Sequential:
        """Return the layers of a head's tower from :meth:`start` on."""
        return getattr(head, self.name)[self.start(blocks) :]

    def before_relu(self, blocks: int) -> str:
        """Return the name in the detector of the last layer before the ReLU of a block, counted from 1."""
        return f"head.{self.name}.{self.start(blocks) - 1}"

    def after_relu(self, blocks: int) -> str:
        """Return the name in the detector of the ReLU of a block, counted from 1."""
        return f"head.{self.name}.{self.start(blocks)}"

    def maps(self, outputs, blocks: int) -> list[Tensor]:
        """Return the maps of all levels before the ReLU of a block, which are tapped; with 0 blocks the features."""
        if blocks:
            return outputs.taps[self.before_relu(blocks)]
        return [outputs.features[level] for level in self.levels]


def tower_of(detector: nn.Module, name: str) -> Tower:
    """Return a tower of a dense detector's head, "cls_subnet" or "bbox_subnet".

    Raises:
        InputError: it has none.
    """
    layers = getattr(detector.head, name, None)
    if not isinstance(layers, nn.Sequential):
        found = f"a {type(detector.head).__name__} without a Sequential {name}"
        raise InputError("head", found, "a head with the towers cls_subnet and bbox_subnet")
    # An in-place ReLU would change what was recorded before it.
    relus = tuple(k for k, x in enumerate(layers) if k and isinstance(x, nn.ReLU) and not x.inplace)
    levels = tuple(detector.head_in_features)
    channels = [detector.backbone.output_shape()[levels[0]].channels]
    for start, end in zip((0, *relus), relus):
        widths = [x.out_channels for x in layers[start:end] if isinstance(x, nn.Conv2d)]
        channels.append(widths[-1] if widths else channels[-1])
    return Tower(name, relus, tuple(channels), levels)


def tower_adapters(towers: dict[str, tuple[Tower, Tower]], blocks: int) -> nn.ModuleDict:
    """Return for each tower, by its name, what brings the student's maps after some blocks to the teacher's width.

    It is nothing where widths are equal, otherwise a 1x1 convolution.
    """
    adapters = nn.ModuleDict()
    for s, t in towers.values():
        width, wanted = s.channels[blocks], t.channels[blocks]
        adapters[s.name] = nn.Identity() if width == wanted else nn.Conv2d(width, wanted, 1)
    return adapters
