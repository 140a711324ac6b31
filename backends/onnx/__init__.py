"""Graph -> ONNX: one emitter, a lowering table for each op, dialects for each reader."""
