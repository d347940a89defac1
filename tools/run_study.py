#!/usr/bin/env python3
"""``d2kd study``."""

import sys

from d2kd.tools import main

if __name__ == "__main__":
    main(["study", *sys.argv[1:]])
