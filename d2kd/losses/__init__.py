"""Distillation losses, a file each. They read outputs and know no detector."""

from .base import DistillLoss, DistillLosses, EpochDecay
from .icd import ICDLoss
from .imitation import ImitationLoss
from .tar import TARLoss

__all__ = ["DistillLoss", "DistillLosses", "EpochDecay", "ICDLoss", "ImitationLoss", "TARLoss"]
