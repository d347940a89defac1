"""Modules and functions that the losses are built of."""

from .adapter import FeatureAdapter
from .masks import boxes_to_mask

__all__ = ["FeatureAdapter", "boxes_to_mask"]
