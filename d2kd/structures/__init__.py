"""Plain data that losses, detectors and data sets have in common."""

from .class_map import ClassMap, class_names, num_classes_of
from .instance_priors import InstancePriors

__all__ = ["ClassMap", "InstancePriors", "class_names", "num_classes_of"]
