"""All code that depends on the version of Detectron2.

Tested with 0.6 without compiled operators. Of later official versions, the source was read but not run. There, COCO
evaluation is compiled, a function groups the processes of one machine, FCOS labels are tensors, ``DefaultTrainer``
saves its optimizer (d2kd's trainer has the same keys), files are read inside ``DetectionCheckpointer.load`` alone,
and ``detectron2.export`` can be imported without caffe2. ``tests/test_compat.py`` asserts that a detector has the
modules and methods that d2kd uses: run it with your version.
"""

from __future__ import annotations

import sys
import warnings
import zipfile
from types import ModuleType
from typing import Any

import detectron2
import torch
import torch.distributed as dist
from detectron2 import _C
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling.box_regression import Box2BoxTransformLinear
from detectron2.structures import Boxes
from detectron2.utils import comm
from torch import Tensor, nn


def has_compiled_operators() -> bool:
    """Return whether this Detectron2 was built with its C++ operators, or has d2kd's replacement in Python."""
    return not str(getattr(_C, "__file__", "")).endswith(".py")


def make_local_process_group(size: int) -> None:
    """Create Detectron2's process groups of each machine, with ``size`` processes, as its own ``launch`` does."""
    if hasattr(comm, "create_local_process_group"):  # after 0.6
        comm.create_local_process_group(size)
        return
    for first in range(0, dist.get_world_size(), size):
        ranks = range(first, first + size)
        group = dist.new_group(list(ranks))  # all processes must create all groups
        if dist.get_rank() in ranks:
            comm._LOCAL_PROCESS_GROUP = group


def forget_process_groups() -> None:
    """Remove the references to process groups that Detectron2 keeps in global variables."""
    comm._LOCAL_PROCESS_GROUP = None
    comm._get_global_gloo_group.cache_clear()


def box_tensors(boxes: list[Boxes | Tensor]) -> list[Tensor]:
    """Return boxes as ``(R, 4)`` tensors: up to 0.6, FCOS labels are ``Boxes``, while RetinaNet's are tensors."""
    return [getattr(x, "tensor", x) for x in boxes]


class _Float32Linear(Box2BoxTransformLinear):
    """FCOS's box transform, which decodes boxes in float32, as that of the other detectors does."""

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        return super().apply_deltas(deltas.float(), boxes)


def decode_in_float32(detector: nn.Module) -> None:
    """Let an FCOS decode boxes in float32 with mixed precision, too; in float32 nothing changes.

    Detectron2's decodes in the precision of its deltas. Half precision cannot hold pixels, and the GIoU loss of such
    boxes and the ground truth fails, because it wants one type.
    """
    for module in detector.modules():
        coder = getattr(module, "box2box_transform", None)
        if type(coder) is Box2BoxTransformLinear:
            module.box2box_transform = _Float32Linear(coder.normalize_by_size)


def tracing_adapter() -> type[nn.Module]:
    """Return Detectron2's ``TracingAdapter``; up to 0.6, its package imports caffe2, which PyTorch no longer has."""
    try:
        from detectron2.export import TracingAdapter
    except ImportError:
        package = ModuleType("detectron2.export")
        package.__path__ = [f"{detectron2.__path__[0]}/export"]
        sys.modules[package.__name__] = package  # replaces the package whose import fails
        try:
            from detectron2.export.flatten import TracingAdapter
        finally:
            del sys.modules[package.__name__]
    return TracingAdapter


class _Reader(DetectionCheckpointer):
    """A checkpointer that reads a file without loading it into a model."""

    def _load_model(self, checkpoint: dict) -> None:
        pass  # so that load() returns the whole content


def read_checkpoint(file: str) -> Any:
    """Return the content of a local checkpoint: for Detectron2's formats, a dict with tensors by name under "model".

    A ``.pkl`` is read by Detectron2; it is a pickle, which may run code. A ``.safetensors`` is read by safetensors.
    Other files are read by torch with ``weights_only=True``, which loads nothing but tensors and Python's scalars;
    so is a ``.pkl`` that ``torch.save`` has written.
    """
    if file.endswith(".safetensors"):
        from safetensors.torch import load_file

        return {"model": load_file(file)}
    if file.endswith(".pkl") and not zipfile.is_zipfile(file):
        return _Reader(nn.Module(), save_to_disk=False).load(file, checkpointables=[])
    with warnings.catch_warnings(action="ignore"):  # of a TorchScript file, which is refused
        # Detectron2 would load a .pyth, which is pycls's format, to the GPU from which it was saved.
        content = torch.load(file, map_location="cpu", weights_only=True)
    if file.endswith(".pyth") and isinstance(content, dict) and "model_state" in content:
        state = content["model_state"].items()
        model = {k: v for k, v in state if not k.endswith("num_batches_tracked")}
        return {"model": model, "__author__": "pycls", "matching_heuristics": True}
    return content
