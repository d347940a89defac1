#!/usr/bin/env python3
"""``d2kd visualize``."""

import sys

from d2kd.tools import main

if __name__ == "__main__":
    main(["visualize", *sys.argv[1:]])
