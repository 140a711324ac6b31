"""The TensorRT backends."""
