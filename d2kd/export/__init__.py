"""Export trained detectors to ONNX or TorchScript, and compare them with the originals."""
