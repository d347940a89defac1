"""Distillation losses, one per file. They read detector outputs and do not depend on the detector family."""

from .base import DistillLoss, DistillLosses, EpochDecay, SeededLoss
from .bckd import BCKDLoss
from .crosskd import CrossKDLoss
from .erd import ERDLoss
from .features import FeatureLoss
from .icd import ICDLoss
from .imitation import ImitationLoss
from .ld import LDLoss
from .lwf import LwFLoss
from .pgd import PGDLoss
from .tar import TARLoss

__all__ = [
    "BCKDLoss",
    "CrossKDLoss",
    "DistillLoss",
    "DistillLosses",
    "ERDLoss",
    "EpochDecay",
    "FeatureLoss",
    "ICDLoss",
    "ImitationLoss",
    "LDLoss",
    "LwFLoss",
    "PGDLoss",
    "SeededLoss",
    "TARLoss",
]
