"""Numbers that a model computes in tensors of no dimension although they are sizes: ``torch.tensor(x.shape[1]) + 128``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from graphopt.dims import Dim, Size, floordiv, maximum, minimum
from graphopt.ir import Graph, Value

_ARITHMETIC: Mapping[str, Callable[[Size, Size], Size]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "rsub": lambda a, b: b - a,
    "mul": lambda a, b: a * b,
    "floor_divide": floordiv,
    "minimum": minimum,
    "maximum": maximum,
}


def size_of(graph: Graph, arg: Any) -> Size | None:
    """What an integer without dimensions is as a function of the sizes; None if it depends on data."""
    if not isinstance(arg, Value):
        return arg if isinstance(arg, (int, Dim)) and not isinstance(arg, bool) else None
    if arg.type.shape or arg.type.dtype.is_floating_point:
        return None
    weight, node = graph.weight_of(arg), arg.producer
    if weight is not None:
        return int(weight.load().item())
    if node is None or not node.op.startswith("aten."):
        return None
    name = node.op.split(".")[1]
    if name in ("scalar_tensor", "full"):
        return size_of(graph, node.args["s" if name == "scalar_tensor" else "fill_value"])
    if name == "to":
        return size_of(graph, node.args["self"])
    if name in _ARITHMETIC and node.args.get("alpha", 1) == 1:
        a, b = (size_of(graph, node.args[key]) for key in ("self", "other"))
        return None if a is None or b is None else _ARITHMETIC[name](a, b)
    return None
