"""Numbers that onnxruntime has no kernels for on the CPU (bf16), computed in fp32 and rounded, as eager PyTorch does it there.

::

                                                          %a: f32 = aten.to.dtype(self=%x, dtype=f32)
                                                          %b: f32 = aten.to.dtype(self=%w, dtype=f32)
    %y: bf16 = aten.mul.Tensor(self=%x, other=%w)   ->    %c: f32 = aten.mul.Tensor(self=%a, other=%b)
                                                          %y: bf16 = aten.to.dtype(self=%c, dtype=bf16)
"""

from __future__ import annotations

from typing import Any

import torch

from graphopt.ir import Graph, Node, Value, leaves, map_arg
from graphopt.tensors import TensorType

_NARROW = torch.bfloat16
_WIDE = torch.float32


def widened(graph: Graph) -> tuple[Graph, list[str]]:
    """A graph whose ops are none of bf16 but casts, and where they stood that were. The same graph if none were."""
    if not any(map(_is_narrow, graph.nodes)):
        return graph, []
    made = graph.clone()
    casts: dict[Value, Value] = {}
    found = []
    for node in list(made.nodes):
        if _is_narrow(node):
            found.append(node.where)
            _widen(made, node, casts)
    return made, found


def _is_narrow(node: Node) -> bool:
    """Whether an op works on bf16. Casts do too, and have kernels."""
    if node.op == "aten.to.dtype":
        return False
    told = any(leaf is _NARROW for arg in node.args.values() for leaf in leaves(arg))
    return told or any(value.type.dtype == _NARROW for value in (*node.operands, *node.outputs))


def _widen(graph: Graph, node: Node, casts: dict[Value, Value]) -> None:
    def cast(value: Value, dtype: torch.dtype) -> Value:
        return graph.insert("aten.to.dtype", {"self": value, "dtype": dtype}, before=node, origin=node.origin).output

    def wide(leaf: Any) -> Any:
        if leaf is _NARROW:
            return _WIDE
        if not isinstance(leaf, Value) or leaf.type.dtype != _NARROW:
            return leaf
        if leaf not in casts:
            casts[leaf] = cast(leaf, _WIDE)
        return casts[leaf]

    args = {name: map_arg(arg, wide) for name, arg in node.args.items()}
    types = [TensorType(wide(value.type.dtype), value.type.shape) for value in node.outputs]
    own = graph.insert(node.op, args, types, before=node, origin=node.origin)
    for old, new in zip(node.outputs, own.outputs, strict=True):
        rounded = new if old.type.dtype != _NARROW else cast(new, _NARROW)
        graph.replace(old, rounded)
        graph.take_name(rounded, old)
    graph.remove(node)
