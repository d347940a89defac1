"""What several detectors find in the same images, and how they differ."""

from .comparison import Comparison, Options, compare

__all__ = ["Comparison", "Options", "compare"]
