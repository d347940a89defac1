"""The choice of the outputs class of a detector."""

from __future__ import annotations

from detectron2.modeling.box_regression import Box2BoxTransformRotated
from torch import nn

from ...utils.errors import InputError
from .base import DetectorOutputs
from .dense import DenseOutputs
from .rcnn import RCNNOutputs


def get_outputs_class(detector: nn.Module) -> type[DetectorOutputs]:
    """Return the outputs class of a detector, by its submodules rather than by its class.

    Raises:
        InputError: it is neither an R-CNN on an FPN nor a dense detector with anchors, or its boxes are rotated.
    """
    for module in detector.modules():
        coder = getattr(module, "box2box_transform", None)
        if getattr(module, "box_dim", 4) != 4 or isinstance(coder, Box2BoxTransformRotated):
            raise InputError(
                type(detector).__name__, f"rotated boxes ({type(module).__name__})", "upright ones"
            )
    heads = getattr(detector, "roi_heads", None)
    if hasattr(heads, "box_predictor") and hasattr(heads, "box_pooler"):
        return RCNNOutputs
    if hasattr(detector, "head") and hasattr(detector, "anchor_generator"):
        return DenseOutputs
    raise InputError(
        type(detector).__name__,
        "a detector whose outputs cannot be read",
        "a GeneralizedRCNN on an FPN (Faster, Mask or Cascade R-CNN), a RetinaNet, an FCOS or a GFL",
    )
