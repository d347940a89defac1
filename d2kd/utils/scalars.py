"""Scalars that the device computes, written to the event storage without a wait for each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor

_PENDING = "_d2kd_pending_scalars"


def put_tensors(scalars: Mapping[str, Tensor]) -> None:
    """Write tensors of one element to the event storage, at once or at the end of :func:`scalars_together`."""
    storage = get_event_storage()
    pending = getattr(storage, _PENDING, None)
    if pending is None:
        _write(storage, scalars)
    else:
        pending.update((name, value.detach()) for name, value in scalars.items())


@contextlib.contextmanager
def scalars_together() -> Iterator[None]:
    """Let :func:`put_tensors` write at the end of the outermost block, with one copy from the device."""
    storage = get_event_storage()
    if hasattr(storage, _PENDING):
        yield
        return
    setattr(storage, _PENDING, {})
    try:
        yield
        write_pending()
    finally:
        delattr(storage, _PENDING)


def write_pending() -> None:
    """Write the scalars of :func:`scalars_together` so far, for code that reads them from the event storage."""
    storage = get_event_storage()
    if pending := getattr(storage, _PENDING, None):
        _write(storage, pending)
        pending.clear()


def _write(storage: EventStorage, scalars: Mapping[str, Tensor]) -> None:
    values = torch.stack([value.detach().double() for value in scalars.values()]).tolist()
    storage.put_scalars(**dict(zip(scalars, values)))
