"""A second device without hardware: its tensors keep their values on the CPU, and behave as CUDA's would.

    with StandIn() as device:
        model.to(DEVICE)(batch)
    device.waits  # what Python would have waited for, with source lines

Inside the block, tensors can be created on ``DEVICE``, copied to it and from it. As with CUDA,

* an operation on tensors of both devices fails, unless the one on the CPU is a scalar or an index;
* Python waits where it reads a value or a shape that the device computes, and where it copies without
  ``non_blocking=True``. Each wait is recorded.

Random numbers are drawn from the CPU's generator, so that a step on this device computes what it computes on the CPU.

``DEVICE`` is the one that PyTorch leaves to others, and no backend is registered for it, so that nothing else in the
process changes. Below Python, its tensors are on ``lazy``, a device without users, for which autograd needs no thread.
"""

from __future__ import annotations

import functools
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import detectron2
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import d2kd

D2KD, DETECTRON2, AUTOGRAD, OTHER = "d2kd", "Detectron2", "autograd", "other"
"""Whose code waits: that of the innermost frame in one of the two packages; autograd's; or another's, such as a test's.

In a backward there is no frame. Where an index of the forward is used again, it is the code that indexed.
"""


class _Backend:
    """What PyTorch's autocast and ``torch.manual_seed`` need of a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass  # the CPU's generator draws


DEVICE = torch.device("privateuseone", 0)
torch._register_device_module(DEVICE.type, _Backend())
_BELOW = torch.device("lazy", 0)


def _is_stand_in(device: object) -> bool:
    if not isinstance(device, str | torch.device):
        return False
    return torch.device(device).type in (DEVICE.type, _BELOW.type)


@dataclass(frozen=True)
class Wait:
    """What Python would have waited for.

    Attributes:
        kind: "value", "shape", "to the CPU" or "from the CPU".
        operation: name of the operation, such as "aten.nonzero".
        code: one of ``D2KD``, ``DETECTRON2``, ``AUTOGRAD`` and ``OTHER``.
        line: "file:line" of that code; "" for autograd.
        in_backward: whether autograd waits, for that line.
    """

    kind: str
    operation: str
    code: str
    line: str
    in_backward: bool = False


class StandIn(TorchDispatchMode):
    """The block in which the device exists.

    Attributes:
        waits: all waits so far, in order.
    """

    def __init__(self):
        super().__init__()
        self.waits: list[Wait] = []

    def __enter__(self):
        # torch.tensor() then copies to the device by an operation that this class receives.
        self._before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(self._before)
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}, self.waits)

    def count(self, code: str) -> int:
        """Return the number of waits of ``D2KD``, ``DETECTRON2``, ``AUTOGRAD`` or ``OTHER``."""
        return sum(wait.code == code for wait in self.waits)


class _StandInTensor(Tensor):
    """A tensor that reports ``DEVICE``. Its values are those of ``on_cpu``."""

    on_cpu: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, on_cpu: Tensor):
        tensor = Tensor._make_wrapper_subclass(
            cls,
            on_cpu.size(),
            strides=on_cpu.stride(),
            storage_offset=on_cpu.storage_offset(),
            dtype=on_cpu.dtype,
            layout=on_cpu.layout,
            device=_BELOW,
        )
        tensor.on_cpu = on_cpu
        return tensor

    @property
    def device(self) -> torch.device:
        return DEVICE

    def to(self, *args, **kwargs) -> Tensor:
        args = [_BELOW if _is_stand_in(x) else x for x in args]
        kwargs = {key: _BELOW if _is_stand_in(x) else x for key, x in kwargs.items()}
        return super().to(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        # Outside the block, where nothing is recorded.
        return _run(func, args, kwargs or {}, [])

    def tolist(self):
        return self.detach().cpu().tolist()  # PyTorch's own refuses subclasses

    def numpy(self, **options):
        raise TypeError(f"can't convert a tensor on {DEVICE} to numpy; copy it to the CPU first")

    def __repr__(self, **options):
        return repr(self.detach().cpu())  # nor does it print them

    def __format__(self, spec):
        return format(self.item(), spec) if self.dim() == 0 else object.__format__(self, spec)

    def __reduce_ex__(self, protocol):
        # A file has no type of the tests.
        arguments = self.on_cpu, self.dtype, str(DEVICE), self.requires_grad
        return torch._utils._rebuild_device_tensor_from_cpu_tensor, arguments


_AT = torch.ops.aten
_HAS_AS_STRIDED = torch._C.DispatchKeySet(torch._C.DispatchKey.Meta)
_COPIES = {_AT._to_copy.default, _AT.copy_.default, _AT._copy_from.default}
_INDEXING = {
    _AT.index.Tensor,
    _AT.index_put.default,
    _AT.index_put_.default,
    _AT._index_put_impl_.default,
    _AT._unsafe_index.Tensor,
}
_READS_VALUE = {_AT._local_scalar_dense, _AT.equal, _AT.bincount}
_READS_SHAPE = {
    _AT.nonzero,
    _AT.masked_select,
    _AT.unique_consecutive,
    _AT.unique_dim,
    _AT._unique,
    _AT._unique2,
}
# The keep of CUDA's non-maximum suppression has as many rows as it finds.
_NMS = "torchvision.nms"


def _run(func, args: tuple, kwargs: dict, waits: list[Wait]):
    """Run an operation on the values, refuse mixed devices, and record what Python would wait for."""
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    wrapped = [x for x in tensors if isinstance(x, _StandInTensor)]
    target = kwargs.get("device")
    if not wrapped and not _is_stand_in(target):
        return func(*args, **kwargs)
    to_device = bool(wrapped) if target is None else _is_stand_in(target)
    if func not in _COPIES and wrapped:
        _refuse_mixed(func, args, tensors)
    kind = _wait_kind(func, args, kwargs, bool(wrapped), to_device)
    if kind is not None:
        waits.append(_wait(kind, func, args))

    same = {id(x): x for x in tensors}  # an operation in place returns its input
    same |= {id(x.on_cpu): x for x in wrapped}
    if target is not None:
        kwargs = {**kwargs, "device": "cpu"}
        if func is _AT._to_copy.default and _needs_copy(args[0], to_device):
            kwargs["non_blocking"] = False
    args, kwargs = pytree.tree_map_only(_StandInTensor, lambda x: x.on_cpu, (args, kwargs))

    def wrap(result: Tensor) -> Tensor:
        if id(result) not in same:
            return _StandInTensor(result) if to_device else result
        known = same[id(result)]
        if torch.Tag.inplace_view in func.tags:  # it has changed the shape of its input
            shape = result.shape, result.stride(), result.storage_offset()
            _AT.as_strided_.default.redispatch(_HAS_AS_STRIDED, known, *shape)
        return known

    return pytree.tree_map_only(Tensor, wrap, func(*args, **kwargs))


def _needs_copy(tensor: Tensor, to_device: bool) -> bool:
    return isinstance(tensor, _StandInTensor) != to_device


def _refuse_mixed(func, args: tuple, tensors: list[Tensor]) -> None:
    """Raise RuntimeError where CUDA would, for an operation with a tensor on the device."""
    on_cpu = [x for x in tensors if not isinstance(x, _StandInTensor)]
    if not on_cpu:
        return
    if func in _INDEXING:  # indices may be on the CPU, and a scalar that is assigned
        values = [x for x in (args[0], *args[2:3]) if isinstance(x, Tensor)]
        on_cpu = [x for x in values if not isinstance(x, _StandInTensor)]
        if not on_cpu or (args[0] is not on_cpu[0] and on_cpu[0].dim() == 0):
            return
    elif _takes_scalars(func) and all(x.dim() == 0 for x in on_cpu):
        written = func._schema.is_mutable and not isinstance(args[0], _StandInTensor)
        if not written:
            return
    shapes = ", ".join(str(tuple(x.shape)) for x in on_cpu)
    raise RuntimeError(
        f"Expected all tensors to be on the same device, but {func} got tensors on {DEVICE} and on cpu: {shapes}"
    )


@functools.cache
def _takes_scalars(func) -> bool:
    """Return whether an operation accepts tensors without dimensions from the CPU, as elementwise ones do."""
    name = str(func.overloadpacket)
    return torch.Tag.pointwise in func.tags or name in (
        "aten.where",
        "aten.masked_fill",
        "aten.masked_fill_",
        "aten.fill",
        "aten.fill_",
        "aten.index_fill",
        "aten.index_fill_",
    )


def _wait_kind(func, args: tuple, kwargs: dict, any_ours: bool, to_device: bool) -> str | None:
    packet = func.overloadpacket
    if func is _AT._to_copy.default:
        if not _needs_copy(args[0], to_device):
            return None
        # A copy to memory of the CPU that is not pinned waits in any case.
        if not to_device:
            return "to the CPU"
        return None if kwargs.get("non_blocking") else "from the CPU"
    if func is _AT.copy_.default:
        to, source = (isinstance(x, _StandInTensor) for x in args[:2])
        if to == source:
            return None
        if source:
            return "to the CPU"
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        return None if non_blocking else "from the CPU"
    if not any_ours:
        return None
    if packet in _READS_VALUE:
        return "value"
    if packet in _READS_SHAPE or str(packet) == _NMS:
        return "shape"
    if packet is _AT.repeat_interleave:
        return None if kwargs.get("output_size") is not None else "shape"
    if func in _INDEXING:
        indices = [x for x in args[1] if x is not None]
        if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            # To assign one number is to fill by a mask, which needs no indices.
            fills = len(args) > 2 and args[2].numel() == 1 and not any(args[3:4])
            return None if fills and len(indices) == 1 else "shape"
        if any(not isinstance(x, _StandInTensor) for x in indices):
            return "from the CPU"
    return None


def _wait(kind: str, func, args: tuple) -> Wait:
    code, line = _source(sys._getframe(2))
    indices = [x for x in args[1] if x is not None] if func in _INDEXING else []
    in_backward = code == AUTOGRAD
    for index in indices:
        values = getattr(index, "on_cpu", index)  # the same in the backward
        if in_backward:
            code, line = getattr(values, "_indexed_by", (code, line))
        else:
            values._indexed_by = code, line
    return Wait(kind, str(func.overloadpacket), code, line, in_backward)


_LIBRARIES = tuple(
    str(Path(path)) for path in {*map(sysconfig.get_path, ("stdlib", "purelib", "platlib"))}
)
_PACKAGES = {
    D2KD: str(Path(d2kd.__file__).parent),
    DETECTRON2: str(Path(detectron2.__file__).parent),
}


def _source(frame: FrameType | None) -> tuple[str, str]:
    """Return whose code the innermost frame of a package or of a test is, and its line."""
    while frame is not None:
        file, line = frame.f_code.co_filename, frame.f_lineno
        for code, package in _PACKAGES.items():
            if file.startswith(package):
                return code, f"{Path(file).relative_to(Path(package).parent)}:{line}"
        if frame.f_code.co_name == "_engine_run_backward":
            break
        if not file.startswith((*_LIBRARIES, "<", __file__)):
            return OTHER, f"{Path(file).name}:{line}"
        frame = frame.f_back
    return AUTOGRAD, ""
