#!/usr/bin/env python3
"""``d2kd init``."""

import sys

from d2kd.tools import main

if __name__ == "__main__":
    main(["init", *sys.argv[1:]])
