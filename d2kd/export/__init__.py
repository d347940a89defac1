"""Trained detectors as ONNX or TorchScript, measured beside where they came from."""

from .formats import ExportedDetector, prepare_for_export, write

__all__ = ["ExportedDetector", "prepare_for_export", "write"]
