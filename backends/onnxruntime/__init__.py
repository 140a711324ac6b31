"""ONNX Runtime: its dialect with contrib ops, tactics timed on the machine, the engine."""
