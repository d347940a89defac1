"""Statistics of a data set's objects: class frequencies and box sizes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.utils.file_io import PathManager
from torch import Tensor

from ..utils.errors import InputError


@dataclass(frozen=True, eq=False)
class InstancePriors:
    """Class frequencies and box sizes of the objects of K classes.

    Attributes:
        frequency: ``(K,)``, relative class frequencies; their sum need not be 1.
        mean, std: ``(K, 2)``, box width and height of each class, as fractions of image width and height.

    Raises:
        InputError: if shapes disagree, a number is negative or not finite, or all frequencies are 0.
    """

    frequency: Tensor
    mean: Tensor
    std: Tensor

    def __post_init__(self):
        for name in ("frequency", "mean", "std"):
            value = torch.as_tensor(getattr(self, name), dtype=torch.float32)
            object.__setattr__(self, name, value)
            shape = (self.num_classes,) if name == "frequency" else (self.num_classes, 2)
            if value.shape != shape:
                found = f"shape {tuple(value.shape)}"
                raise InputError(f"priors.{name}", found, "a row for each class, width and height")
            if not (torch.isfinite(value) & (value >= 0)).all():
                raise InputError(f"priors.{name}", "not finite or negative", "numbers from 0")
        if not self.frequency.sum() > 0:
            raise InputError("priors.frequency", "0 for every class", "at least one that occurs")

    @property
    def num_classes(self) -> int:
        return len(self.frequency)

    @classmethod
    def uniform(cls, num_classes: int) -> InstancePriors:
        """Return priors without data: equal frequencies, and sizes of mean 0.2 and standard deviation 0.2."""
        sides = torch.full((num_classes, 2), 0.2)
        return cls(torch.ones(num_classes), sides, sides)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per class, in the format of the ``rows`` that :meth:`load` reads."""
        return [
            {"class": k, "frequency": frequency, "mean": mean, "std": std}
            for k, (frequency, mean, std) in enumerate(
                zip(self.frequency.tolist(), self.mean.tolist(), self.std.tolist())
            )
        ]

    @classmethod
    def load(cls, path: str) -> InstancePriors:
        """Read ``{"schema": 1, "rows": [{"class": k, "frequency": …, "mean": [w, h], "std": [w, h]}, …]}``.

        Rows may be in any order.

        Raises:
            InputError: if the file does not exist or has another format.
        """
        expected = 'JSON with "rows" of class, frequency, mean and std'
        if not PathManager.isfile(path):
            raise InputError(path, "no such file", expected)
        try:
            with PathManager.open(path, "r", encoding="utf-8") as file:
                rows = sorted(json.load(file)["rows"], key=lambda row: int(row["class"]))
            if [int(row["class"]) for row in rows] != list(range(len(rows))):
                raise ValueError("classes are not 0, 1, 2 … once each")
            columns = [[row[key] for row in rows] for key in ("frequency", "mean", "std")]
            return cls(*(torch.tensor(column, dtype=torch.float32) for column in columns))
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(path, f"{type(error).__name__}: {error}", expected) from error
        except InputError as error:
            raise InputError(f"{path}: {error.culprit}", error.found, error.expected) from error
