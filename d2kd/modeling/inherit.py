"""A student that starts from its teacher's weights."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import torch
from torch import nn

from ..structures.class_map import ClassMap
from ..utils.errors import InputError
from .weights import STATISTICS

logger = logging.getLogger(__name__)


@torch.no_grad()
def inherit_weights(
    student: nn.Module,
    teacher: nn.Module,
    prefixes: Sequence[str],
    class_map: ClassMap | None = None,
    flip_channels: bool = False,
) -> list[str]:
    """Copy the teacher's weights of equal name and shape under the prefixes; returns the names copied.

    What the student has under a prefix and the teacher lacks, or has in another shape or for other classes, is
    logged and kept. If the first convolution's weights were trained with other pixel statistics, that is logged.

    Args:
        student, teacher: the detectors.
        prefixes: of parameter names.
        class_map: of two detectors whose classes differ. The layer that a student names as its ``classifier``
            is then copied row by row: a shared class's from the teacher, the others stay as they were made. Other
            layers with rows for each class, see :func:`has_class_rows`, are kept as they were made.
        flip_channels: whether the teacher's images have their channels in the other order. The first convolution
            is then copied with its input channels turned, and answers the student's images the same.

    Raises:
        InputError: channels are to be turned and there is no convolution of three channels.
    """
    source = teacher.state_dict()
    own = {k: v for k, v in student.state_dict().items() if k.startswith(tuple(prefixes))}
    rows = []
    if class_map is not None and hasattr(student, "classifier"):
        rows = [f"{student.classifier}.{name}" for name in ("weight", "bias")]
        rows = [
            k for k in rows if k in own and k in source and source[k][0].shape == own[k][0].shape
        ]
    whole = [k for k, v in own.items() if k in source and source[k].shape == v.shape]
    if class_map is not None and not class_map.is_identity:
        count = len(class_map.student)
        whole = [k for k in whole if not has_class_rows(k, own[k].shape[:1].numel(), count)]
    whole = [k for k in whole if k not in rows]
    stem = stem_of(student)
    if flip_channels and stem is None and any(k.startswith("backbone.") for k in whole):
        found = "the teacher sees another channel order, and no convolution has three channels"
        raise InputError("inherit", found, "equal input_format, or no weights of the backbone")
    for key in whole:
        own[key].copy_(source[key].flip(1) if flip_channels and key == stem else source[key])
    for key in STATISTICS if stem in whole else ():
        ours, theirs = (getattr(d, key).flatten() for d in (student, teacher))
        theirs = theirs.flip(0) if flip_channels else theirs
        if not torch.allclose(ours, theirs.to(ours)):
            logger.warning(
                "the inherited %s was trained with %s %s; the student's is %s",
                stem,
                key,
                theirs.tolist(),
                ours.tolist(),
            )
    for key in rows:
        own[key][class_map.of_student] = source[key][class_map.of_teacher].to(own[key])
    kept = sorted(own.keys() - {*whole, *rows})
    logger.info("inherited %d tensors of the teacher under %s", len(whole), list(prefixes))
    if rows:
        logger.info(
            "inherited the rows of %d of %d classes in %s",
            len(class_map.pairs),
            len(class_map.student),
            student.classifier,
        )
    if kept:
        logger.warning("not inherited, absent, of another shape or class: %s", ", ".join(kept))
    return whole + rows


def stem_of(detector: nn.Module) -> str | None:
    """The name of the weight that sees the image: of the first convolution of the backbone with three channels."""
    body = "backbone.bottom_up" if hasattr(detector.backbone, "bottom_up") else "backbone"
    for name, module in detector.get_submodule(body).named_modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            return f"{body}.{name}.weight"
    return None


def has_class_rows(name: str, rows: int, num_classes: int) -> bool:
    """Whether a weight of one of Detectron2's detectors has rows for each class: class scores have, and the boxes
    and masks of RoI heads unless they are the same for all classes."""
    layer = re.match(r"(head|roi_heads\..*)\.(cls_score|bbox_pred|predictor)\.", name)
    if layer is None or layer[2] == "cls_score":
        return layer is not None
    return layer[1] != "head" and rows == {"bbox_pred": 4, "predictor": 1}[layer[2]] * num_classes
