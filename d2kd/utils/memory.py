"""Measurement of peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

import torch


class PeakMemory:
    """The peak of memory since construction: allocated tensors of a GPU, or resident memory of this process.

    ``getrusage`` cannot be used: its peak includes the process's past, and its parent's.

    Args:
        device: the GPU, or the CPU for this process.

    Attributes:
        before: bytes in use at construction; None if unknown, on systems other than Linux.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.before: int | None = None
        gc.collect()  # an earlier run's trainer and its hooks have references to each other
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
            return
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # or freed, still resident memory would be reused
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak, see proc(5)
            self.before = _status("VmRSS")

    @property
    def bytes(self) -> int | None:
        """Bytes in use at the peak so far, or None."""
        if self.before is None:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _status("VmHWM")

    @property
    def growth(self) -> int | None:
        """Bytes at the peak minus :attr:`before`, or None."""
        return None if self.before is None else max(self.bytes - self.before, 0)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith(f"{key}:"))
    return int(kib) * 1024
