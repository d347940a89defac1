"""Trained detectors as ONNX or TorchScript, measured beside where they came from."""
