"""Small detectors and batches that every test may use; see :mod:`d2kd.testing`."""

from d2kd.testing import (  # noqa: F401  (handed on to the tests)
    CLASSES,
    DETECTORS,
    batch,
    build,
    tiny_faster_rcnn,
    tiny_fcos,
    tiny_retinanet,
)
