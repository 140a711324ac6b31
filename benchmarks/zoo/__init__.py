"""A zoo of transformers architectures, each compiled for ONNX Runtime and held beside ``torch.onnx.export``."""
