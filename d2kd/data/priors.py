"""Estimate the frequency and the size of the objects of each class in a data set."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode

from ..structures.class_map import class_names
from ..structures.instance_priors import InstancePriors
from ..utils.errors import InputError
from .datasets import check_dataset


def estimate_priors(names: Any, num_classes: int | None = None) -> InstancePriors:
    """Estimate class frequencies and box sizes from annotations. Crowd regions are ignored, as in training.

    A class without objects has frequency 0, and mean and standard deviation of all objects.

    Args:
        names: data sets, as in :func:`check_dataset`.
        num_classes: by default, the number of class names of the first data set.

    Raises:
        InputError: if a data set is invalid, has no objects, or has objects of other classes.
    """
    names = check_dataset(names)
    label = ", ".join(names)
    # Some data sets have class names only after they are loaded.
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
