"""Pieces that losses are made of."""

from .adapter import FeatureAdapter
from .masks import paint

__all__ = ["FeatureAdapter", "paint"]
