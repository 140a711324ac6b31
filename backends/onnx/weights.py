"""Weights into the model: streamed one by one into one external data file, or inline for small models."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from io import RawIOBase
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from graphopt.backends.onnx.emitter import PLAIN, Emitter
from graphopt.tensors import Weight

ALIGNMENT = 4096  # so that a reader can map the file into memory
INLINE = 1024  # bytes; readers infer shapes from small tensors, and do not look into the file for it


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes, without a copy if it is contiguous in main memory."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    array: Any = flat.numpy()
    return memoryview(array)


def write_external(
    emitter: Emitter, folder: Path, name: str, progress: Callable[[int, int], None] = lambda done, total: None
) -> str:
    """Write every weight but the smallest into ``folder/name`` and let the model refer to it. Holds one weight at a time.

    Returns the file's sha256."""
    initializers = emitter.model.graph.initializers
    large = {key: weight for key, weight in emitter.weights.items() if weight.nbytes > INLINE}
    embed(emitter, emitter.weights.keys() - large.keys())
    total = sum(weight.nbytes for weight in large.values())
    file_digest = hashlib.sha256()
    offset = 0
    with (folder / name).open("wb", buffering=0) as file:
        for key, weight in large.items():
            gap = -offset % ALIGNMENT
            data = raw_bytes(weight.load())
            for part in (memoryview(bytes(gap)), data):
                file_digest.update(part)
                _write_all(file, part)
            offset += gap
            shape, dtype = initializers[key].shape, initializers[key].dtype
            assert shape is not None
            assert dtype is not None
            initializers[key].const_value = ir.ExternalTensor(
                name, offset, len(data), dtype, shape=shape, name=key, base_dir=folder
            )
            offset += len(data)
            progress(offset, total)
    return file_digest.hexdigest()


def _write_all(file: RawIOBase, data: memoryview) -> None:
    while len(data):
        data = data[file.write(data) or 0 :]


def embed(emitter: Emitter, names: Collection[str] | None = None) -> None:
    """Put these weights, or all, into the model itself."""
    for key in emitter.weights if names is None else names:
        value = emitter.model.graph.initializers[key]
        value.const_value = _tensor(value, emitter.weights[key])


def _tensor(value: ir.Value, weight: Weight) -> ir.TensorProtocol:
    """The weight's bytes as what the initializer is declared to be."""
    assert value.dtype is not None
    assert value.shape is not None
    tensor = weight.load().detach().cpu().contiguous()
    if weight.type.dtype in PLAIN:
        return ir.Tensor(tensor.view(PLAIN[weight.type.dtype]).numpy().view(value.dtype.numpy()), name=value.name)
    if value.dtype == ir.DataType.INT4:
        return ir.PackedTensor(tensor.numpy().reshape(-1), value.dtype, shape=value.shape, name=value.name)
    return ir.Tensor(
        tensor.numpy().view(value.dtype.numpy()).reshape(value.shape.numpy()), value.dtype, name=value.name
    )
