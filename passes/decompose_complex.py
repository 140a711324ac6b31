"""Complex numbers as pairs of reals: no backend computes with anything else.

::

    %c = aten.view_as_complex.default(self=%x)         %r = aten.select.int(self=%x, dim=4, index=0)
    %z = aten.mul.Tensor(self=%c, other=%f)      ->    %i = aten.select.int(self=%x, dim=4, index=1)
    %y = aten.view_as_real.default(self=%z)            %a = aten.mul.Tensor(self=%r, other=%f.real)
                                                       ...
                                                       %y = aten.stack.default(tensors=[%re, %im], dim=4)

What is left complex (a Fourier transform) is an op of its own, entered and left as real pairs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal, TypeAlias

from graphopt.errors import GraphError
from graphopt.ir import Graph, Node, Value, leaves, map_arg
from graphopt.pipeline import Context, Pass
from graphopt.rewrite import Build, RewriteLog
from graphopt.tensors import TensorType, Weight

Pair: TypeAlias = "tuple[Any, Any]"
#: Ops that do the same to both parts.
_MOVES = frozenset(
    {
        "reshape", "expand", "unsqueeze", "transpose", "permute", "slice", "select", "index", "cat", "stack", "flip", "roll",
        "repeat_interleave", "repeat", "gather", "embedding", "sum", "mean", "neg", "constant_pad_nd", "index_select",
    }
)  # fmt: skip


class DecomposeComplex(Pass):
    """Compute complex values as pairs of real ones."""

    kind: Literal["decompose_complex"] = "decompose_complex"
    provides: ClassVar[frozenset[str]] = frozenset({"real"})

    def run(self, graph: Graph, context: Context) -> RewriteLog:
        log = RewriteLog()
        pairs: dict[Value, Pair] = {}
        for node in graph.nodes:
            if any(_is_complex(value) for value in (*node.operands, *node.outputs)):
                _decompose(graph, node, pairs, log)
        graph.prune()
        return log


def _is_complex(arg: Any) -> bool:
    return isinstance(arg, Value) and arg.type.dtype.is_complex


def _decompose(graph: Graph, node: Node, pairs: dict[Value, Pair], log: RewriteLog) -> None:
    build = Build(graph, node, (*node.origin, "decompose_complex"))
    name = node.op.split(".")[1]
    handler = _HANDLERS.get(name) or (_move if name in _MOVES else None)
    if handler is None:
        return  # it stays complex; its users read its parts through view_as_real
    result: Any = handler(build, node, lambda arg: _parts(build, graph, pairs, arg))
    if _is_complex(node.output):
        pairs[node.output] = result
    else:
        graph.replace(node.output, result)
        graph.take_name(result, node.output)
    log.matches[name] = log.matches.get(name, 0) + 1


def _parts(op: Build, graph: Graph, pairs: dict[Value, Pair], arg: Any) -> Pair:
    """The real and the imaginary part of an operand."""
    if not isinstance(arg, Value):
        number = complex(arg)
        return number.real, number.imag
    if not arg.type.dtype.is_complex:
        return arg, 0.0
    if arg not in pairs:
        weight = graph.weight_of(arg)
        if weight is not None:
            pairs[arg] = _weights(op, arg, weight)
        elif arg.producer is None:
            raise GraphError(f"the input %{arg.name} is complex", hint="give the model its real and imaginary part")
        else:
            both = op.view_as_real(arg)
            pairs[arg] = op.select.int(both, len(arg.type.shape), 0), op.select.int(both, len(arg.type.shape), 1)
    return pairs[arg]


def _weights(op: Build, arg: Value, weight: Weight) -> Pair:
    type = TensorType(arg.type.dtype.to_real(), arg.type.shape)

    def part(name: str) -> Value:
        return op.weight(f"{arg.name}.{name}", Weight(type, lambda: getattr(weight.load(), name).contiguous()))

    return part("real"), part("imag")


def _add(op: Build, a: Any, b: Any) -> Any:
    return a if _is_zero(b) else b if _is_zero(a) else op.add.Tensor(a, b)


def _sub(op: Build, a: Any, b: Any) -> Any:
    return a if _is_zero(b) else op.sub.Tensor(a, b) if isinstance(a, Value) else op.rsub.Scalar(b, a)


def _mul(op: Build, a: Any, b: Any) -> Any:
    if _is_zero(a) or _is_zero(b):
        return 0.0
    return op.mul.Tensor(a, b) if isinstance(a, Value) else op.mul.Tensor(b, a)


def _is_zero(part: Any) -> bool:
    return not isinstance(part, Value) and part == 0


Read: TypeAlias = Callable[[Any], Pair]


def _product(op: Build, node: Node, read: Read) -> Pair:
    (a, b), (c, d) = read(node.args["self"]), read(node.args["other"])
    return _sub(op, _mul(op, a, c), _mul(op, b, d)), _add(op, _mul(op, a, d), _mul(op, b, c))


def _sum(op: Build, node: Node, read: Read) -> Pair:
    (a, b), (c, d) = read(node.args["self"]), read(node.args["other"])
    combine = _add if node.op.startswith("aten.add") else _sub
    if node.args.get("alpha", 1) != 1:
        raise GraphError("a complex sum with alpha", where=node.where)
    return combine(op, a, c), combine(op, b, d)


def _quotient(op: Build, node: Node, read: Read) -> Pair:
    (a, b), (c, d) = read(node.args["self"]), read(node.args["other"])
    if not _is_zero(d):
        raise GraphError("a division by complex numbers", where=node.where, hint="multiply by the inverse")
    return op.div.Tensor(a, c), op.div.Tensor(b, c)


def _polar(op: Build, node: Node, read: Read) -> Pair:
    radius, angle = node.args["abs"], node.args["angle"]
    return op.mul.Tensor(radius, op.cos(angle)), op.mul.Tensor(radius, op.sin(angle))


def _exponential(op: Build, node: Node, read: Read) -> Pair:
    a, b = read(node.args["self"])
    radius = op.exp(a) if isinstance(a, Value) else None
    parts = (op.cos(b), op.sin(b))
    return parts if radius is None else (op.mul.Tensor(radius, parts[0]), op.mul.Tensor(radius, parts[1]))


def _as_complex(op: Build, node: Node, read: Read) -> Pair:
    pair = node.args["self"]
    last = len(pair.type.shape) - 1
    return op.select.int(pair, last, 0), op.select.int(pair, last, 1)


def _as_real(op: Build, node: Node, read: Read) -> Value:
    a, b = read(node.args["self"])
    result: Value = op.stack((_whole(op, node, a), _whole(op, node, b)), len(node.output.type.shape) - 1)
    return result


def _whole(op: Build, node: Node, part: Any) -> Value:
    """A part as a tensor of the complex value's own shape."""
    shape, dtype = node.args["self"].type.shape, node.output.type.dtype
    if not isinstance(part, Value):
        filled: Value = op.full.default(shape, part, dtype=dtype)
        return filled
    expanded: Value = part if part.type.shape == shape else op.expand(part, shape)
    return expanded


def _real(op: Build, node: Node, read: Read) -> Value:
    return _whole(op, node, read(node.args["self"])[0])


def _imaginary(op: Build, node: Node, read: Read) -> Value:
    return _whole(op, node, read(node.args["self"])[1])


def _absolute(op: Build, node: Node, read: Read) -> Value:
    a, b = read(node.args["self"])
    result: Value = op.sqrt(_add(op, _mul(op, a, a), _mul(op, b, b)))
    return result


def _conjugate(op: Build, node: Node, read: Read) -> Pair:
    a, b = read(node.args["self"])
    return a, op.neg(b) if isinstance(b, Value) else -b


def _make(op: Build, node: Node, read: Read) -> Pair:
    return node.args["real"], node.args["imag"]


def _cast(op: Build, node: Node, read: Read) -> Any:
    """To another complex dtype, from a real one, or to a real one, which drops the imaginary part."""
    a, b = read(node.args["self"])
    dtype = node.output.type.dtype
    real = dtype.to_real() if dtype.is_complex else dtype
    parts = [
        op.to.dtype(part, real) if isinstance(part, Value) and part.type.dtype != real else part for part in (a, b)
    ]
    return (parts[0], parts[1]) if dtype.is_complex else parts[0]


def _move(op: Build, node: Node, read: Read) -> Pair:
    """The same op on each part."""
    found = [leaf for arg in node.args.values() for leaf in leaves(arg) if _is_complex(leaf)]
    results = []
    for index in (0, 1):
        parts: dict[Any, Any] = {leaf: read(leaf)[index] for leaf in found}
        args = {name: map_arg(arg, functools.partial(_instead, parts)) for name, arg in node.args.items()}
        results.append(op.call(node.op, args)[0])
    return results[0], results[1]


def _instead(parts: dict[Any, Any], leaf: Any) -> Any:
    return parts.get(leaf, leaf) if isinstance(leaf, Value) else leaf


_HANDLERS: dict[str, Callable[[Build, Node, Read], Any]] = {
    "mul": _product,
    "add": _sum,
    "sub": _sum,
    "div": _quotient,
    "polar": _polar,
    "exp": _exponential,
    "view_as_complex": _as_complex,
    "view_as_real": _as_real,
    "real": _real,
    "imag": _imaginary,
    "abs": _absolute,
    "conj": _conjugate,
    "_conj": _conjugate,
    "conj_physical": _conjugate,
    "_conj_physical": _conjugate,
    "complex": _make,
    "to": _cast,
}
