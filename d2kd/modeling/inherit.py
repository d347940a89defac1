"""Initialization of a student with its teacher's weights."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import torch
from torch import nn

from ..structures.class_map import ClassMap
from ..utils.errors import InputError
from .weights import PIXEL_STATISTICS

logger = logging.getLogger(__name__)


@torch.no_grad()
def inherit_weights(
    student: nn.Module,
    teacher: nn.Module,
    prefixes: Sequence[str],
    class_map: ClassMap | None = None,
    flip_channels: bool = False,
) -> list[str]:
    """Copy the teacher's weights of equal name and shape under the prefixes.

    The student's other weights under a prefix, which the teacher lacks or has in another shape or for other
    classes, are kept and logged. Different pixel statistics are logged if the first convolution is copied.

    Args:
        student, teacher: the detectors.
        prefixes: prefixes of parameter names.
        class_map: given if the classes differ. The rows of shared classes are then copied in the layer whose name
            is the student's attribute ``classifier``, and its other rows keep their initialization. So do other
            layers with rows for each class, see :func:`has_class_rows`.
        flip_channels: whether the teacher's images have the channels in the other order. The input channels of
            the first convolution are then flipped, so that its output is the same for the student's images.

    Returns:
        the names of the copied weights.

    Raises:
        InputError: channels must be flipped and no convolution has three input channels.
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
    stem = find_stem_weight(student)
    if flip_channels and stem is None and any(k.startswith("backbone.") for k in whole):
        found = "the teacher sees another channel order, and no convolution has three channels"
        raise InputError("inherit", found, "equal input_format, or no weights of the backbone")
    for key in whole:
        own[key].copy_(source[key].flip(1) if flip_channels and key == stem else source[key])
    for key in PIXEL_STATISTICS if stem in whole else ():
        value, inherited = (getattr(d, key).flatten() for d in (student, teacher))
        inherited = inherited.flip(0) if flip_channels else inherited
        if not torch.allclose(value, inherited.to(value)):
            logger.warning(
                "the inherited %s was trained with %s %s; the student's is %s",
                stem,
                key,
                inherited.tolist(),
                value.tolist(),
            )
    for key in rows:
        own[key][class_map.student_ids] = source[key][class_map.teacher_ids].to(own[key])
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


def find_stem_weight(detector: nn.Module) -> str | None:
    """Return the name of the weight of the backbone's first convolution with three input channels, or None."""
    body = "backbone.bottom_up" if hasattr(detector.backbone, "bottom_up") else "backbone"
    for name, module in detector.get_submodule(body).named_modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            return f"{body}.{name}.weight"
    return None


def has_class_rows(name: str, rows: int, num_classes: int) -> bool:
    """Return whether a weight of a Detectron2 detector has rows for each class.

    True for class scores, and for box and mask predictors of RoI heads that are not class-agnostic.
    """
    layer = re.match(r"(head|roi_heads\..*)\.(cls_score|bbox_pred|predictor)\.", name)
    if layer is None or layer[2] == "cls_score":
        return layer is not None
    return layer[1] != "head" and rows == {"bbox_pred": 4, "predictor": 1}[layer[2]] * num_classes
