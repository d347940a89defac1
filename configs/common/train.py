"""The default ``train`` of recipes. ``d2kd/config/train.py`` describes each key."""

from d2kd.config import train_defaults

train = train_defaults()
