"""Distillation losses, one per file. They read detector outputs and do not depend on the detector family."""

from .base import DistillLoss, DistillLosses, EpochDecay
from .erd import ERDLoss
from .icd import ICDLoss
from .imitation import ImitationLoss
from .lwf import LwFLoss
from .tar import TARLoss

__all__ = [
    "DistillLoss",
    "DistillLosses",
    "ERDLoss",
    "EpochDecay",
    "ICDLoss",
    "ImitationLoss",
    "LwFLoss",
    "TARLoss",
]
