"""Figures that Detectron2's evaluators do not give."""

from .coco import old_new_all

__all__ = ["old_new_all"]
