"""What the objects of each class are like in a data set: how frequent they are, and how large."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from torch import Tensor

from d2kd.classes import class_names
from d2kd.data.datasets import check_dataset
from d2kd.errors import InputError


@dataclass(frozen=True, eq=False)
class InstancePriors:
    """How frequent and how large the objects of K classes are.

    Attributes:
        frequency: ``(K,)``, the classes' shares of all objects, up to a factor.
        mean, std: ``(K, 2)``, width and height of a class's boxes as parts of the image's.

    Raises:
        InputError: the shapes disagree, or the numbers are none of such.
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
    def unknown(cls, num_classes: int) -> InstancePriors:
        """Nothing known: every class as frequent, and 0.2 of the image wide and high, give or take 0.2."""
        sides = torch.full((num_classes, 2), 0.2)
        return cls(torch.ones(num_classes), sides, sides)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each class, as :meth:`load` reads them from the ``rows`` of a JSON file."""
        return [
            {"class": k, "frequency": frequency, "mean": mean, "std": std}
            for k, (frequency, mean, std) in enumerate(
                zip(self.frequency.tolist(), self.mean.tolist(), self.std.tolist())
            )
        ]

    @classmethod
    def load(cls, path: str) -> InstancePriors:
        """Read ``{"schema": 1, "rows": [{"class": k, "frequency": …, "mean": [w, h], "std": [w, h]}, …]}``.

        Rows may come in any order.

        Raises:
            InputError: there is no such file, or it is none of such.
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


def estimate_priors(names: Any, num_classes: int | None = None) -> InstancePriors:
    """Count and measure the annotated objects of data sets; crowds are left out, as in training.

    A class without any objects has frequency 0 and the mean and spread of all objects.

    Args:
        names: names of registered data sets, or what :func:`check_dataset` takes.
        num_classes: None: as many as the first data set has class names, see :func:`d2kd.classes.class_names`.

    Raises:
        InputError: a data set cannot be used, has no objects, or has objects of other classes.
    """
    names = check_dataset(names)
    label = ", ".join(names)
    # Some data sets know their classes only once they were loaded.
    records = [record for name in names for record in DatasetCatalog.get(name)]
    if num_classes is None:
        num_classes = len(class_names(names))
    classes, sides = [], []
    for record in records:
        for one in record.get("annotations", ()):
            if one.get("iscrowd", 0):
                continue
            if not 0 <= one["category_id"] < num_classes:
                found = f"an object of class {one['category_id']} in {record.get('file_name')}"
                raise InputError(label, found, f"classes from 0 to {num_classes - 1}")
            x0, y0, x1, y1 = BoxMode.convert(one["bbox"], one["bbox_mode"], BoxMode.XYXY_ABS)
            classes.append(one["category_id"])
            sides.append(((x1 - x0) / record["width"], (y1 - y0) / record["height"]))
    if not classes:
        raise InputError(label, "no annotated object", "at least one, to know how large they are")
    classes, sides = np.array(classes), np.array(sides)
    groups = [sides[classes == k] for k in range(num_classes)]
    groups = [group if len(group) else sides for group in groups]
    return InstancePriors(
        torch.from_numpy(np.bincount(classes, minlength=num_classes) / len(classes)),
        torch.from_numpy(np.stack([group.mean(axis=0) for group in groups])),
        torch.from_numpy(np.stack([group.std(axis=0) for group in groups])),
    )
