"""This project's functions against arrays that the methods' published implementations computed.

    python -m tests.parity --method icd tests/parity/icd.npz

README.md lists the arrays. A method is a function of the arrays of a file, read by name, that returns what
this project makes of the inputs, under the names of the outputs.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from d2kd.utils.errors import InputError


class Arrays(dict):
    """The arrays of an npz file.

    Raises:
        InputError: the file is no npz file; at a look-up, that it has no such array.
    """

    def __init__(self, path: str | Path):
        self.path = path
        try:
            with np.load(path) as file:
                super().__init__(file)
        except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
            found = f"unreadable ({type(error).__name__})"
            raise InputError(path, found, "an npz file of arrays") from error

    def __missing__(self, name: str) -> np.ndarray:
        raise InputError(self.path, f"no array {name!r}", "every array that README.md lists")

    def tensor(self, name: str) -> torch.Tensor:
        """A copy, floats as float32."""
        tensor = torch.from_numpy(np.array(self[name]))
        return tensor.float() if tensor.is_floating_point() else tensor


Method = Callable[[Arrays], dict[str, np.ndarray | torch.Tensor]]


def compare(
    ours: np.ndarray | torch.Tensor,
    reference: np.ndarray,
    tolerance: float = 1e-4,
    slack: float | None = 1e-7,
) -> tuple[float, float, bool]:
    """Largest absolute and relative difference, and whether they agree; infinite where shapes differ.

    Floats agree if -inf is in the same places and elsewhere no difference exceeds ``tolerance`` of the largest
    reference, plus ``slack``. A slack of None is 0, or ``tolerance`` where the reference is 0. Other arrays agree if they
    are equal.
    """
    ours = ours.detach().cpu().numpy() if isinstance(ours, torch.Tensor) else np.asarray(ours)
    if ours.shape != reference.shape:
        return np.inf, np.inf, False
    exact = not np.issubdtype(reference.dtype, np.floating)
    ours, reference = ours.astype(np.float64), reference.astype(np.float64)
    nothing = np.isneginf(reference)
    if (nothing != np.isneginf(ours)).any():
        return np.inf, np.inf, False
    ours, reference = ours[~nothing], reference[~nothing]
    absolute = float(np.abs(ours - reference).max(initial=0.0))
    largest = float(np.abs(reference).max(initial=0.0))
    relative = absolute / largest if largest else (0.0 if absolute == 0 else np.inf)
    if slack is None:
        slack = 0.0 if largest else tolerance
    return absolute, relative, absolute <= (0.0 if exact else tolerance * largest + slack)
