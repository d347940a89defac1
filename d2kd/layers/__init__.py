"""Modules and functions that the losses are built of."""

from .adapter import FeatureAdapter
from .masks import paint

__all__ = ["FeatureAdapter", "paint"]
