"""The fallback for an op without a lowering: export that one op with ``torch.onnx.export`` and inline what comes out.

So an op is never worse off than in PyTorch's own exporter. Exports are cached by the op, its operands' types and its other
arguments. Sizes in the arguments come in as the shapes of extra operands.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch

from graphopt import operators
from graphopt.backends.onnx.emitter import Emitter, Lowered, Unsupported
from graphopt.dims import Dim
from graphopt.ir import Node, Value, leaves, map_arg
from graphopt.tensors import DimRange

_exported: dict[Any, ir.Model] = {}
_ANY = 1 << 20


def lower_by_export(e: Emitter, node: Node) -> Lowered:
    """Inline the node's own export. Unsupported if PyTorch's exporter refuses it as well."""
    operands = list(dict.fromkeys(node.operands))
    names = sorted({name for arg in node.args.values() for leaf in leaves(arg) for name in _names(leaf)})
    if not operands and not names:
        made = operators.call(node.op, node.args, "cpu")
        return tuple(e.constant(tensor.numpy()) for tensor in made)
    key = _key(node, operands)
    if key not in _exported:
        _exported[key] = _of_any_size(node, operands, names, e.graph.dims, e.dialect.opsets[""])
    carriers = [e.op("ConstantOfShape", e.size(Dim.named(name))) for name in names]
    return _inline(e, _exported[key], [*map(e.value, operands), *carriers])


def _names(leaf: Any) -> frozenset[str]:
    return leaf.names if isinstance(leaf, Dim) else frozenset()


def _key(node: Node, operands: list[Value]) -> Any:
    place = {operand: index for index, operand in enumerate(operands)}

    def leaf_key(leaf: Any) -> Any:
        return (place[leaf], leaf.type) if isinstance(leaf, Value) else (type(leaf), leaf)

    return node.op, tuple((name, map_arg(arg, leaf_key)) for name, arg in node.args.items())


class _Single(torch.nn.Module):
    """One op as a module; the last inputs carry the named sizes as their lengths."""

    def __init__(self, node: Node, operands: list[Value], names: list[str]) -> None:
        super().__init__()
        self.node, self.operands, self.names = node, operands, names

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = dict(zip(self.operands, tensors, strict=False))
        env = {name: carrier.shape[0] for name, carrier in zip(self.names, tensors[len(self.operands) :], strict=True)}

        def real(leaf: Any) -> Any:
            if isinstance(leaf, Value):
                return values[leaf]
            return leaf.evaluate(env) if isinstance(leaf, Dim) else leaf

        return operators.call(self.node.op, {name: map_arg(arg, real) for name, arg in self.node.args.items()}, "cpu")


def _of_any_size(
    node: Node, operands: list[Value], names: list[str], dims: Mapping[str, DimRange], opset: int
) -> ir.Model:
    """The export, which is the same for an example of other sizes: some decompositions count steps by the example's (a search in
    sorted numbers), and are wrong for more."""
    all_names = sorted(set(names).union(*(operand.type.names for operand in operands)))
    small = {name: max(5, dims[name].min) + 2 * index for index, name in enumerate(all_names)}
    made = _export(node, operands, names, small, opset)
    large = {name: max(size, min(8 * size + 1, dims[name].max or _ANY)) for name, size in small.items()}
    if large != small and _form(_export(node, operands, names, large, opset)) != _form(made):
        raise Unsupported("its export by torch.onnx depends on the sizes of the example")
    return made


def _form(model: ir.Model) -> list[Any]:
    """Ops, attributes and constants of a model, without names."""
    constants = [initializer.const_value for initializer in model.graph.initializers.values()]
    return [
        *((node.op_type, len(node.inputs), str(sorted(map(str, node.attributes.values())))) for node in model.graph),
        *(None if each is None else each.numpy().tolist() for each in constants),
    ]


def _export(node: Node, operands: list[Value], names: list[str], env: Mapping[str, int], opset: int) -> ir.Model:
    all_names = sorted(env)
    examples = [torch.zeros(o.type.concrete(env).shape, dtype=o.type.dtype) for o in operands]  # type: ignore[arg-type]
    examples += [torch.zeros(env[name]) for name in names]
    dims = {name: torch.export.Dim(name, min=2) for name in all_names}
    dynamic = [_dynamic(operand, dims) for operand in operands] + [{0: dims[name]} for name in names]
    module = _Single(node, operands, names)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module, tuple(examples), dynamo=True, opset_version=opset, verbose=False,
                dynamic_shapes=(tuple(dynamic),),
            )  # fmt: skip
    except Exception as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise Unsupported(f"torch.onnx.export refuses it: {first[0][:200]}") from error
    assert program is not None
    model: ir.Model = program.model
    return model


def _dynamic(operand: Value, dims: dict[str, Any]) -> dict[int, Any] | None:
    """Dynamic axes of an operand: named ones by name, expressions left to torch."""
    found: dict[int, Any] = {}
    for axis, size in enumerate(operand.type.shape):
        if isinstance(size, Dim):
            found[axis] = dims[size.name] if size.name is not None else torch.export.Dim.DYNAMIC
    return found or None


def _inline(e: Emitter, model: ir.Model, inputs: list[ir.Value]) -> Lowered:
    """The exported graph's nodes, copied into the emission."""
    values: dict[ir.Value, ir.Value] = dict(zip(model.graph.inputs, inputs, strict=True))
    for function in model.functions.values():
        e.attach(function)
    for initializer in model.graph.initializers.values():
        assert initializer.const_value is not None
        values[initializer] = e.constant(initializer.const_value.numpy())
    for node in model.graph:
        _copy(e, node, values)
    return tuple(values[output] for output in model.graph.outputs)


def _copy(e: Emitter, node: ir.Node, values: dict[ir.Value, ir.Value]) -> None:
    if any(
        attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in node.attributes.values()
    ):
        raise Unsupported(f"its export holds control flow ({node.op_type})")
    operands = [None if value is None else values[value] for value in node.inputs]
    made = ir.Node(node.domain, node.op_type, operands, list(node.attributes.values()), num_outputs=len(node.outputs))
    e.add(made)
    values.update(zip(node.outputs, made.outputs, strict=True))
