#!/usr/bin/env python3
"""``d2kd train``."""

import sys

from d2kd.tools import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
