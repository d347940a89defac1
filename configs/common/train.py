"""Every recipe's ``train`` until the recipe says otherwise. ``d2kd/config/train.py`` explains each key."""

from d2kd.config import train_defaults

train = train_defaults()
