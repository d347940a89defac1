#!/usr/bin/env python3
"""``d2kd export``."""

import sys

from d2kd.tools import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
