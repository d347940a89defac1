"""``bccd_resnet18.py`` with a teacher of 1500 steps instead of 600, which is the better detector."""

from .bccd_resnet18 import from_resnet50

runs, study = from_resnet50(teacher_steps=1500)
