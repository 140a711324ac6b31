"""Caches of another dtype than the model computes in.

``dtype: fp16`` and ``fp32`` are casts, ``int8`` is scaled by the largest magnitudes of calibration::

    %i = graphopt.quantize.default(x=%k, scale=%k.scale)
    %k2 = graphopt.kv_cache_update.default(cache=%past_key_values.0.key, new=%i, starts=%past_lengths)
    %d = graphopt.dequantize.default(x=%k2, scale=%k.scale)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from graphopt import attentions
from graphopt.calibration import Tapped
from graphopt.ir import Graph, Node, Value
from graphopt.passes.quantized_weights import LEVELS
from graphopt.pipeline import Context
from graphopt.schemas.calibration import Calibration
from graphopt.tensors import Weight

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
_ORIGIN = "insert_kv_cache"


@dataclass
class Kept:
    """How keys and values are kept: as they are, in another dtype, or as int8 by ``scales`` ``[1, H, 1, D or 1]`` of each."""

    graph: Graph
    dtype: torch.dtype | None = None
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    _weights: dict[str, Value] = field(default_factory=dict)

    def dtype_of(self, new: Value) -> torch.dtype:
        return torch.int8 if self.scales else self.dtype or new.type.dtype

    def stored(self, new: Value, before: Node) -> Value:
        """New keys or values as the cache holds them."""
        if self.scales:
            return self._insert("graphopt.quantize.default", before, x=new, scale=self._scale(new))
        return self._cast(new, self.dtype_of(new), before)

    def read(self, cache: Value, new: Value, before: Node) -> Value:
        """The cache as attention reads it, in the dtype of new keys or values."""
        if self.scales:
            return self._insert("graphopt.dequantize.default", before, x=cache, scale=self._scale(new))
        return self._cast(cache, new.type.dtype, before)

    def _cast(self, value: Value, dtype: torch.dtype, before: Node) -> Value:
        if value.type.dtype == dtype:
            return value
        return self._insert("aten.to.dtype", before, self=value, dtype=dtype)

    def _insert(self, op: str, before: Node, /, **args: object) -> Value:
        return self.graph.insert(op, args, before=before, origin=(*before.origin, _ORIGIN)).output

    def _scale(self, new: Value) -> Value:
        if new.name not in self._weights:
            dtype = new.type.dtype
            weight = Weight.of(self.scales[new.name].to(dtype).clamp(min=torch.finfo(dtype).tiny))
            self._weights[new.name] = self.graph.add_weight(self.graph.unique(f"{new.name}.scale"), weight)
        return self._weights[new.name]


def calibrated(graph: Graph, context: Context, config: Calibration, each: Literal["head", "channel"]) -> Kept:
    """int8 by the magnitudes of keys and values that data gives."""
    axes = (1,) if each == "head" else (1, 3)
    causal = [node for node in attentions.fused(graph) if node.args["causal"] != "none"]
    taps = {node.args[name].name: Tapped(node.args[name].name, axes) for node in causal for name in "kv"}
    found = context.calibrate(graph, config, taps.values())
    return Kept(graph, scales={name: _scale(largest) for name, largest in found.items()})


def _scale(largest: Tensor) -> Tensor:
    """``[1, H, 1, D or 1]``; where a channel is always 0 any scale will do."""
    smallest = torch.finfo(torch.float32).eps * largest.max()
    scale = largest.maximum(smallest) / LEVELS
    return scale[None, :, None, None] if scale.ndim == 1 else scale[None, :, None, :]
