"""Small detectors and batches that every test may use, see :mod:`d2kd.testing`; and the tools as modules."""

import importlib.util
from pathlib import Path
from types import ModuleType

from d2kd.testing import (  # noqa: F401  (handed on to the tests)
    CLASSES,
    DETECTORS,
    batch,
    build,
    tiny_faster_rcnn,
    tiny_fcos,
    tiny_retinanet,
)

ROOT = Path(__file__).parent.parent


def load_tool(name: str) -> ModuleType:
    """A fresh module of ``tools/<name>.py``, which is on no import path."""
    spec = importlib.util.spec_from_file_location(f"{name}_tool", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
