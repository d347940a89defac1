"""Detectron2 meta-architectures: Distiller and GFL."""

from .distiller import Distiller, add_distiller_config
from .gfl import GFL, GFLHead, add_gfl_config

__all__ = ["GFL", "Distiller", "GFLHead", "add_distiller_config", "add_gfl_config"]
