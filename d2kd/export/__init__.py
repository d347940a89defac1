"""Trained detectors as ONNX or TorchScript, measured beside where they came from."""

from .formats import ExportedDetector, export_detector, prepare_for_export

__all__ = ["ExportedDetector", "export_detector", "prepare_for_export"]
