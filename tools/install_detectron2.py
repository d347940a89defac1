#!/usr/bin/env python3
"""``d2kd install-detectron2``, also before d2kd is installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from d2kd.tools import main  # noqa: E402

if __name__ == "__main__":
    main(["install-detectron2", *sys.argv[1:]])
