"""The protocol of engines: named tensors in, named tensors out, checked before the backend sees them."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from graphopt.dims import Dim, names_of
from graphopt.errors import EngineError, InputError
from graphopt.execution import bind_dims
from graphopt.runtime.cache import CacheLayout
from graphopt.runtime.kv_cache import KvCache
from graphopt.schemas.manifest import Manifest, TensorSpec
from graphopt.tensors import DTYPE_NAMES, DTYPES, DimRange, TensorType, is_of_truths
from graphopt.text import parse_type


class Engine(ABC):
    """``engine(input_ids=..., attention_mask=...) -> {"logits": ...}``.

    numpy arrays in give numpy arrays out, torch tensors give torch tensors. InputError says which input does not fit."""

    #: What runs once before: an encoder. Its outputs are inputs of this engine, by name.
    prologue: Engine | None = None

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.inputs = {name: _type(spec) for name, spec in manifest.inputs.items()}
        self.outputs = {name: _type(spec) for name, spec in manifest.outputs.items()}
        self.dims = {name: DimRange(*bounds) for name, bounds in manifest.dims.items()}
        sizes = (size for type in self.inputs.values() for size in type.shape)
        unknown = frozenset[str]().union(*map(names_of, sizes)) - self.dims.keys()
        if unknown:
            raise EngineError(f"the manifest is damaged at dims: inputs are of {', '.join(sorted(unknown))}")

    def __call__(self, **tensors: Any) -> dict[str, Any]:
        bind_dims(self.inputs, self.dims, {name: signature(name, tensor) for name, tensor in tensors.items()})
        self._check_mask(tensors)
        torch_in = any(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
        return self.run(tensors, torch_in)

    def _check_mask(self, tensors: Mapping[str, Any]) -> None:
        """InputError if the padding mask holds other numbers than those that the engine was proven with. (On a GPU nobody
        looks: it would have to wait.)"""
        name = self.manifest.mask
        mask = None if name is None else tensors.get(name)
        if mask is None or (isinstance(mask, torch.Tensor) and mask.is_cuda):
            return
        if not is_of_truths(to_numpy(mask)):  # torch's threads would spin on beside the engine's
            raise InputError(
                f"{name} holds other numbers than 0 and 1",
                hint="the engine was proven with a mask of tokens (1) and padding (0); for other masks: Source(mask='')",
            )

    @property
    def ways(self) -> Sequence[Callable[..., dict[str, Any]]]:
        """What a call may be computed by, each to be proven: the engine itself, where it has one way for all sizes."""
        return [self]

    @functools.cached_property
    def layout(self) -> CacheLayout | None:
        """How its cache is laid out, if it has one."""
        return CacheLayout.of(self.inputs, self.outputs, self.dims)

    @property
    def cache_layout(self) -> CacheLayout:
        """How its cache is laid out. EngineError if it has none."""
        if self.layout is None:
            raise EngineError("the engine has no cache", hint="compile with the pass insert_kv_cache")
        return self.layout

    def new_cache(self, batch: int, once: Mapping[str, torch.Tensor] | None = None) -> KvCache:
        """An empty cache for ``batch`` texts; ``once`` are the inputs that stay the same in every step, an encoder's results.

        EngineError if the engine has no cache, InputError if the batch is out of range."""
        layout = self.cache_layout
        for size in {type.shape[0] for name, type in self.inputs.items() if name in layout.names}:
            if isinstance(size, Dim) and size.name is not None and batch not in self.dims[size.name]:
                raise InputError(
                    f"a batch of {batch} is outside {self.dims[size.name]}", hint="compile with a wider range in dims"
                )
            if isinstance(size, int) and size != batch:
                raise InputError(f"the engine was built for a batch of {size}, not of {batch}")
        return self._new_cache(layout, batch, once or {})

    def _new_cache(self, layout: CacheLayout, batch: int, once: Mapping[str, torch.Tensor]) -> KvCache:
        return KvCache(self, layout, batch, once)

    @abstractmethod
    def run(self, tensors: Mapping[str, Any], as_torch: bool) -> dict[str, Any]:
        """Run on checked inputs; results as torch tensors or numpy arrays."""

    def __repr__(self) -> str:
        parts = (f"{name}: {type}" for name, type in self.inputs.items())
        results = (f"{name}: {type}" for name, type in self.outputs.items())
        return f"<{self.manifest.backend} engine ({', '.join(parts)}) -> ({', '.join(results)})>"


def _type(spec: TensorSpec) -> TensorType:
    return parse_type(f"{spec.dtype}[{', '.join(map(str, spec.shape))}]")


def spec_of(type: TensorType) -> TensorSpec:
    return TensorSpec(
        dtype=DTYPE_NAMES[type.dtype], shape=[size if isinstance(size, int) else str(size) for size in type.shape]
    )


def signature(name: str, tensor: Any) -> tuple[str, tuple[int, ...]]:
    """Dtype name and shape of an input. InputError if it is neither a tensor nor an array."""
    if isinstance(tensor, torch.Tensor):
        return DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape)
    if isinstance(tensor, np.ndarray):
        known = {"bool": "bool", "bfloat16": "bf16"}
        short = known.get(tensor.dtype.name, tensor.dtype.kind + str(tensor.dtype.itemsize * 8))
        return short if short in DTYPES else tensor.dtype.name, tensor.shape
    raise InputError(f"input {name!r} is a {type(tensor).__name__}", hint="give a torch tensor or a numpy array")


def to_numpy(tensor: Any) -> np.ndarray:
    """A torch tensor or numpy array as a contiguous array in main memory, without a copy where it is one."""
    if isinstance(tensor, torch.Tensor):
        tensor = tensor.detach().cpu().contiguous()
        if tensor.dtype == torch.bfloat16:
            import ml_dtypes

            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)  # type: ignore[no-any-return]
        tensor = tensor.numpy()
    array: np.ndarray = np.asarray(tensor, order="C")  # ascontiguousarray would make a scalar one-dimensional
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def to_torch(array: np.ndarray) -> torch.Tensor:
    """An array as a tensor, without a copy if it is contiguous and may be written."""
    array = np.require(to_numpy(array), requirements=["C", "W"]) if array.ndim else np.array(to_numpy(array))
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
