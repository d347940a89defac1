"""Metrics of a training step as tensors, so that the step does not wait for the device to read them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from detectron2.utils.events import get_event_storage
from torch import Tensor

_collected: ContextVar[dict[str, Tensor] | None] = ContextVar("collected metrics", default=None)


def put_metric(name: str, value: Tensor) -> None:
    """Log a metric that is a tensor on the device.

    Detectron2's ``put_scalar`` reads the value at once, and waits for the device. Inside :func:`collect_metrics`, as in
    d2kd's trainer, it is read later, with all other metrics of the step. Elsewhere it is read at once.

    Args:
        name: of the metric.
        value: a tensor of one element.
    """
    metrics = _collected.get()
    if metrics is None:
        get_event_storage().put_scalar(name, value)
    else:
        metrics[name] = value.detach().reshape(())


@contextlib.contextmanager
def collect_metrics() -> Iterator[dict[str, Tensor]]:
    """Collect what :func:`put_metric` logs in the block; yields the dict of the metrics."""
    metrics: dict[str, Tensor] = {}
    token = _collected.set(metrics)
    try:
        yield metrics
    finally:
        _collected.reset(token)


class HostCopy:
    """A copy of a tensor in the host's memory, which the device makes while the host continues.

    Args:
        value: the tensor. On a CPU it is not copied.
    """

    def __init__(self, value: Tensor):
        self._event = None
        if value.device.type == "cuda":
            self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._value = value

    def tolist(self) -> list:
        """Return the values as Python numbers, as soon as the device has copied them."""
        if self._event is not None:
            self._event.synchronize()
        return self._value.tolist()
