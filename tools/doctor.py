#!/usr/bin/env python3
"""``d2kd doctor``."""

import sys

from d2kd.tools import main

if __name__ == "__main__":
    main(["doctor", *sys.argv[1:]])
