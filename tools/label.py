#!/usr/bin/env python3
"""``d2kd label``."""

import sys

from d2kd.tools import main

if __name__ == "__main__":
    main(["label", *sys.argv[1:]])
