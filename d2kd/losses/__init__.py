"""Distillation losses, one per file. They read detector outputs and do not depend on the detector family."""

from .base import DistillLoss, DistillLosses, EpochDecay, SeededLoss
from .bckd import BCKDLoss
from .crosskd import CrossKDLoss
from .cwd import CWDLoss
from .dist import DISTLoss
from .dkd import DKDLoss
from .erd import ERDLoss
from .features import FeatureLoss
from .fgd import FGDLoss
from .icd import ICDLoss
from .imitation import ImitationLoss
from .ld import LDLoss
from .lwf import LwFLoss
from .mgd import MGDLoss
from .pgd import PGDLoss
from .pkd import PKDLoss
from .reviewkd import ReviewKDLoss
from .tar import TARLoss

__all__ = [
    "BCKDLoss",
    "CWDLoss",
    "CrossKDLoss",
    "DISTLoss",
    "DKDLoss",
    "DistillLoss",
    "DistillLosses",
    "ERDLoss",
    "EpochDecay",
    "FGDLoss",
    "FeatureLoss",
    "ICDLoss",
    "ImitationLoss",
    "LDLoss",
    "LwFLoss",
    "MGDLoss",
    "PGDLoss",
    "PKDLoss",
    "ReviewKDLoss",
    "SeededLoss",
    "TARLoss",
]
