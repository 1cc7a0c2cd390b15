"""Engines: they compile an ONNX model for one device and run it. They know nothing of pruning."""
