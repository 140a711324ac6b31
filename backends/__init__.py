"""Backends: the ONNX emitter that engines share, ONNX Runtime, torch."""
