"""``python -m d2kd`` is the command ``d2kd``."""

from .tools import main

main()
