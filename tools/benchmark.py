#!/usr/bin/env python3
"""``d2kd benchmark``."""

import sys

from d2kd.tools import main

if __name__ == "__main__":
    main(["benchmark", *sys.argv[1:]])
