"""Run a graph in torch: the interpreter, taps, and the graph as a trainable module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graphopt import operators
from graphopt.dims import Dim, evaluate, names_of, rest_of
from graphopt.errors import GraphError, InputError, nearest
from graphopt.ir import Graph, Node, Value, map_arg, types_of
from graphopt.tensors import DTYPE_NAMES, DimRange, TensorType

Tap = Callable[[Value, Tensor], None]


def bind_dims(
    inputs: Mapping[str, TensorType], dims: Mapping[str, DimRange], given: Mapping[str, tuple[str, tuple[int, ...]]]
) -> dict[str, int]:
    """The number behind every named size, read from the given ``(dtype name, shape)`` of each input.

    InputError says which input is missing, unknown, of another dtype, rank or size, or outside its range."""
    missing, unknown = inputs.keys() - given.keys(), given.keys() - inputs.keys()
    if missing:
        raise InputError(f"missing input: {', '.join(sorted(missing))}", hint=f"inputs: {_signature(inputs)}")
    if unknown:
        raise InputError(f"unknown input: {', '.join(sorted(unknown))}", hint=nearest(min(unknown), inputs))
    env: dict[str, int] = {}
    read_from: dict[str, str] = {}
    for name, type in inputs.items():
        dtype, shape = given[name]
        if dtype != DTYPE_NAMES[type.dtype]:
            raise InputError(f"input {name!r} has dtype {dtype}, needs {DTYPE_NAMES[type.dtype]}")
        if len(shape) != len(type.shape):
            raise InputError(f"input {name!r} has shape {list(shape)}, needs {len(type.shape)} dimensions: {type}")
        for size, got in zip(type.shape, shape, strict=True):
            if isinstance(size, Dim) and size.name and size.name not in env:
                env[size.name], read_from[size.name] = got, name
    _solve(inputs, given, env, read_from)
    for name, type in inputs.items():
        for axis, (size, got) in enumerate(zip(type.shape, given[name][1], strict=True)):
            needed = size.evaluate(env) if isinstance(size, Dim) else size
            if needed != got:
                source = ""
                if isinstance(size, Dim):
                    source = f" ({size}, from {', '.join(sorted({read_from[n] for n in size.names}))})"
                raise InputError(f"input {name!r} has size {got} at axis {axis}, needs {needed}{source}")
    for name, size in env.items():
        if size not in dims[name]:
            raise InputError(
                f"{name} is {size}, outside {dims[name]}",
                where=f"input {read_from[name]!r}",
                hint="compile with a wider range in dims, or split the input",
            )
    return env


def _solve(
    inputs: Mapping[str, TensorType],
    given: Mapping[str, tuple[str, tuple[int, ...]]],
    env: dict[str, int],
    read_from: dict[str, str],
) -> None:
    """Names that stand alone on no axis, from sums that they are part of."""
    for name, type in inputs.items():
        for size, got in zip(type.shape, given[name][1], strict=True):
            unknown = [part for part in names_of(size) if part not in env]
            if len(unknown) == 1 and (rest := rest_of(size, unknown[0])) is not None:
                env[unknown[0]], read_from[unknown[0]] = got - evaluate(rest, env), name


def _signature(inputs: Mapping[str, TensorType]) -> str:
    return ", ".join(f"{name}: {type}" for name, type in inputs.items())


class Run:
    """One run of a graph, node by node: ``step`` each of ``graph.nodes`` in order, then ``outputs``. Values are kept as long as
    something needs them; ``weights`` replaces the data of some or all of the graph's own."""

    def __init__(self, graph: Graph, inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None = None) -> None:
        given = {
            name: (DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
            for name, tensor in inputs.items()
        }
        declared = types_of(graph.inputs)
        self._graph, self._env = graph, bind_dims(declared, graph.dims, given)
        self._device = next((tensor.device for tensor in inputs.values()), torch.device("cpu"))
        self.values: dict[Value, Tensor] = {graph.value(name): tensor for name, tensor in inputs.items()}
        for name, weight in graph.weights.items():
            own = weights[name] if weights and name in weights else weight.load().to(self._device)
            self.values[graph.value(name)] = own
        self._pending = {value: sum(value.users.values()) for value in graph.values.values()}
        for value in graph.outputs.values():
            self._pending[value] += 1

    def step(self, node: Node) -> tuple[Tensor, ...]:
        """Compute a node, and let go of what nothing needs any more."""
        results = operators.call(
            node.op, {name: map_arg(arg, self._real) for name, arg in node.args.items()}, self._device
        )
        if len(results) != len(node.outputs):
            raise GraphError(
                f"{node.op} gives {len(results)} results at these sizes, and gave {len(node.outputs)} when it was traced",
                where=node.where,
                hint="it gives fewer parts of a short axis: narrow dims, or take parts whose number is fixed (split, narrow)",
            )
        for value, tensor in zip(node.outputs, results, strict=True):
            if self._pending[value]:
                self.values[value] = tensor
        for operand in node.operands:
            self._pending[operand] -= 1
            if not self._pending[operand]:
                del self.values[operand]
        return tuple(results)

    def outputs(self) -> dict[str, Tensor]:
        return {name: self.values[value] for name, value in self._graph.outputs.items()}

    def _real(self, leaf: Any) -> Any:
        if isinstance(leaf, Value):
            return self.values[leaf]
        return leaf.evaluate(self._env) if isinstance(leaf, Dim) else leaf


def run(
    graph: Graph,
    inputs: Mapping[str, Tensor],
    *,
    tap: Tap | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The outputs of the graph by name. ``tap`` sees every value that a node computes, in order; ``weights`` replaces the
    data of some or all of the graph's own. Inputs, weights and result live on one device: the inputs'."""
    own = Run(graph, inputs, weights)
    for node in graph.nodes:
        for value, tensor in zip(node.outputs, own.step(node), strict=True):
            if tap is not None:
                tap(value, tensor)
    return own.outputs()


class GraphModule(nn.Module):
    """A graph as a module: floating weights are parameters, others buffers, under their own names."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graphopt_graph = graph  # a name that no weight's path begins with
        self._graphopt_places: dict[str, tuple[nn.Module, str]] = {}
        for name, weight in graph.weights.items():
            *path, leaf = name.split(".")
            owner: nn.Module = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner._modules[part]  # type: ignore[assignment]
            tensor = weight.load().clone()  # training must not reach the graph's weights, which may be a model's own
            if tensor.is_floating_point():
                owner.register_parameter(leaf, nn.Parameter(tensor))
            else:
                owner.register_buffer(leaf, tensor)
            self._graphopt_places[name] = owner, leaf

    def forward(self, *args: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
        """Outputs by name; positional inputs in the graph's order."""
        graph = self._graphopt_graph
        if len(args) > len(graph.inputs):
            raise InputError(
                f"{len(args)} inputs are given, the graph has {len(graph.inputs)}: {', '.join(graph.inputs)}"
            )
        inputs = dict(zip(graph.inputs, args, strict=False)) | kwargs
        weights = {name: getattr(owner, leaf) for name, (owner, leaf) in self._graphopt_places.items()}
        return run(graph, inputs, weights=weights)


def copy_into(target: Graph, source: Graph, mapping: dict[Value, Value]) -> None:
    """Append the nodes of ``source`` to ``target``. ``mapping`` gives the target's value for every input of the source;
    it is completed with weights (shared) and node outputs."""
    for name, weight in source.weights.items():
        if source.value(name) not in mapping:
            mapping[source.value(name)] = target.add_weight(name, weight)
    for node in source.nodes:
        args = {
            name: map_arg(arg, lambda leaf: mapping[leaf] if isinstance(leaf, Value) else leaf)
            for name, arg in node.args.items()
        }
        copy = target.insert(
            node.op, args, [v.type for v in node.outputs], names=[v.name for v in node.outputs], origin=node.origin
        )
        mapping.update(zip(node.outputs, copy.outputs, strict=True))
