"""What tensors are like: element types, shapes, ranges of named sizes; and weights, which are loaded when they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.dims import Dim, Size, names_of

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8",
    torch.uint16: "u16", torch.uint32: "u32", torch.uint64: "u64",
    torch.bool: "bool", torch.complex64: "c64", torch.complex128: "c128",
    torch.float8_e4m3fn: "f8e4m3", torch.float8_e5m2: "f8e5m2",
}  # fmt: skip
DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True, slots=True)
class TensorType:
    """Element type and shape: ``f32[batch, 2*sequence, 384]``."""

    dtype: torch.dtype
    shape: tuple[Size, ...]

    def __str__(self) -> str:
        return f"{DTYPE_NAMES[self.dtype]}[{', '.join(map(str, self.shape))}]"

    @property
    def names(self) -> frozenset[str]:
        return frozenset().union(*(names_of(size) for size in self.shape))

    def concrete(self, env: Mapping[str, int]) -> TensorType:
        """The type with every named size replaced by its number."""
        return TensorType(
            self.dtype, tuple(size.evaluate(env) if isinstance(size, Dim) else size for size in self.shape)
        )


@dataclass(frozen=True, slots=True)
class DimRange:
    """The sizes a named dimension may take, both ends included; ``max`` None is no bound."""

    min: int = 1
    max: int | None = None

    def __str__(self) -> str:
        return f"[{self.min}, {'...' if self.max is None else self.max}]"

    def __contains__(self, size: object) -> bool:
        return isinstance(size, int) and size >= self.min and (self.max is None or size <= self.max)


_SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A constant tensor, read only when asked for: a parameter, a buffer, a lifted or folded constant."""

    type: TensorType
    load: Callable[[], torch.Tensor]

    @staticmethod
    def of(tensor: torch.Tensor) -> Weight:
        """A weight that refers to a tensor, without a copy."""
        tensor = tensor.detach()
        return Weight(TensorType(tensor.dtype, tuple(tensor.shape)), lambda: tensor)

    @staticmethod
    def from_safetensors(path: str, key: str) -> Weight:
        """A weight that stays on disk until it is asked for."""
        from safetensors import safe_open

        def load() -> torch.Tensor:
            with safe_open(path, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(key)
            return tensor

        with safe_open(path, framework="pt") as file:
            part = file.get_slice(key)
            dtype = _SAFETENSORS_DTYPES[part.get_dtype()]
            return Weight(TensorType(dtype, tuple(part.get_shape())), load)

    @property
    def nbytes(self) -> int:
        count = self.type.dtype.itemsize
        for size in self.type.shape:
            count *= int(size)  # type: ignore[arg-type]  # weights have constant sizes
        return count


def is_of_truths(mask: Any) -> bool:
    """Whether an array or tensor holds nothing but zeros and ones."""
    return not bool(((mask != 0) & (mask != 1)).any())
