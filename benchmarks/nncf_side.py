"""NNCF's post-training quantization of an ONNX model by OpenVINO, in an environment of its own: ``python -m benchmarks.nncf_side
MODEL DATA OUT`` with DATA an .npz of inputs ``[examples, ...]``. Imports nothing of the project."""

from __future__ import annotations

import importlib
import sys

import numpy as np


def main(model: str, data: str, out: str) -> None:
    nncf, openvino = importlib.import_module("nncf"), importlib.import_module("openvino")
    arrays = dict(np.load(data, allow_pickle=False))
    count = len(next(iter(arrays.values())))
    rows = [{name: array[row : row + 8] for name, array in arrays.items()} for row in range(0, count, 8)]
    transformer = nncf.ModelType.TRANSFORMER
    made = nncf.quantize(
        openvino.Core().read_model(model), nncf.Dataset(rows), model_type=transformer, subset_size=len(rows)
    )
    openvino.save_model(made, out, compress_to_fp16=False)
    print(nncf.__version__)


if __name__ == "__main__":
    main(*sys.argv[1:4])
