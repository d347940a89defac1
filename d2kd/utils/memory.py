"""Memory at the peak, as the device or the system tells it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

import torch


class Peak:
    """The most memory in use from here on: of a GPU's tensors, or resident of this process.

    ``getrusage`` would not do: its peak is that of the process's whole life, and of its parent's.

    Args:
        device: whose memory is meant.

    Attributes:
        before: bytes in use when it was made; None where the system, other than Linux, does not tell.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.before: int | None = None
        gc.collect()  # of an earlier run a trainer and its hooks hold each other
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
            return
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # or what is free but still resident would be filled
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew, see proc(5)
            self.before = _status("VmRSS")

    @property
    def bytes(self) -> int | None:
        """At the peak so far, or None."""
        if self.before is None:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _status("VmHWM")

    @property
    def growth(self) -> int | None:
        """By how many bytes it has risen at most, or None."""
        return None if self.before is None else max(self.bytes - self.before, 0)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith(f"{key}:"))
    return int(kib) * 1024
