"""Where Detectron2's versions differ in what this project uses, all of it.

Tried on 0.6 without compiled operators. Later official builds were read, not run: there evaluation is compiled,
processes of one machine are grouped by a function of its own, FCOS labels with tensors, ``DefaultTrainer`` saves its
optimizer itself (our trainer's state has the same keys), files are read inside ``DetectionCheckpointer.load`` alone,
and ``detectron2.export`` imports without caffe2. What d2kd listens to and reads of a detector is
asserted by ``tests/test_compat.py``: run it on yours.
"""

from __future__ import annotations

import sys
from types import ModuleType

import detectron2
import torch
import torch.distributed as dist
from detectron2 import _C
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.structures import Boxes
from detectron2.utils import comm
from torch import Tensor, nn


def has_compiled_operators() -> bool:
    """Whether this Detectron2 was built with its C++ sources, or with Python standing in for them."""
    return not str(getattr(_C, "__file__", "")).endswith(".py")


def make_local_process_group(size: int) -> None:
    """Tell Detectron2 which processes share a machine, ``size`` on each; only its own launch does so."""
    if hasattr(comm, "create_local_process_group"):  # after 0.6
        comm.create_local_process_group(size)
        return
    for first in range(0, dist.get_world_size(), size):
        ranks = range(first, first + size)
        group = dist.new_group(list(ranks))  # made by all, wherever it is
        if dist.get_rank() in ranks:
            comm._LOCAL_PROCESS_GROUP = group


def forget_process_groups() -> None:
    """Let go of the groups that Detectron2 keeps for as long as the process lives."""
    comm._LOCAL_PROCESS_GROUP = None
    comm._get_global_gloo_group.cache_clear()


def box_tensors(boxes: list[Boxes | Tensor]) -> list[Tensor]:
    """Boxes as ``(R, 4)`` tensors: FCOS labels with ``Boxes`` up to 0.6, as RetinaNet never did."""
    return [getattr(one, "tensor", one) for one in boxes]


def tracing_adapter() -> type[nn.Module]:
    """Detectron2's ``TracingAdapter``; up to 0.6 its package imports caffe2, which PyTorch no longer has."""
    try:
        from detectron2.export import TracingAdapter
    except ImportError:
        package = ModuleType("detectron2.export")
        package.__path__ = [f"{detectron2.__path__[0]}/export"]
        sys.modules[package.__name__] = package  # in the place of the one that fails
        try:
            from detectron2.export.flatten import TracingAdapter
        finally:
            del sys.modules[package.__name__]
    return TracingAdapter


class _Reader(DetectionCheckpointer):
    """Loads what it reads into nothing."""

    def _load_model(self, checkpoint: dict) -> None:
        pass  # so that load() has all of it to return


def read_checkpoint(file: str) -> dict:
    """The content of a checkpoint on this machine, its tensors under "model".

    A ``.pkl`` is a pickle, which may run code, and its format is for Detectron2 to tell. All else is torch's own
    format, of tensors and Python's scalars: nothing else is unpickled, whatever the version's default.
    """
    if file.endswith(".pkl"):
        return _Reader(nn.Module(), save_to_disk=False).load(file, checkpointables=[])
    # Detectron2 would bring a .pyth, which is of pycls, to the GPU that it was saved from.
    content = torch.load(file, map_location="cpu", weights_only=True)
    if file.endswith(".pyth") and "model_state" in content:
        state = content["model_state"].items()
        model = {k: v for k, v in state if not k.endswith("num_batches_tracked")}
        return {"model": model, "__author__": "pycls", "matching_heuristics": True}
    return content if "model" in content else {"model": content}
