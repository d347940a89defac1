#!/usr/bin/env python3
"""``d2kd compare``."""

import sys

from d2kd.tools import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])
