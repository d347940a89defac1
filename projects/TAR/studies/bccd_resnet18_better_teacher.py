"""The study of ``bccd_resnet18.py`` with a better teacher, trained for 1500 instead of 600 iterations."""

from .bccd_resnet18 import from_resnet50

runs, study = from_resnet50(teacher_steps=1500)
