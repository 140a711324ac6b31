"""Random small graphs for property tests, each with a plain PyTorch function that computes the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from graphopt.dims import Dim, Size, evaluate
from graphopt.ir import Graph, Value
from graphopt.tensors import DimRange, TensorType, Weight
from graphopt.text import parse

Evaluate = Callable[[Mapping[str, Tensor]], Tensor]
UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "neg": torch.neg,
}  # fmt: skip
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"add": torch.add, "mul": torch.mul, "sub": torch.sub}


@dataclass
class Case:
    """A graph and the function it stands for, from inputs by name to outputs by name."""

    graph: Graph
    reference: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]

    def sizes(self, first: int = 3) -> dict[str, int]:
        """Different sizes for different names."""
        return {name: first + 2 * index for index, name in enumerate(self.graph.dims)}

    def inputs(self, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        return inputs_at(self.graph, sizes)

    def weights(self) -> dict[str, Tensor]:
        return {name: weight.load() for name, weight in self.graph.weights.items()}


def inputs_at(graph: Graph, sizes: Mapping[str, int], seed: int = 0) -> dict[str, Tensor]:
    """Random floating inputs of the graph at these sizes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: [evaluate(n, sizes) for n in value.type.shape] for name, value in graph.inputs.items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def graph_of(body: str, weights: Mapping[str, Tensor] | None = None, shape: str = "s, 4") -> Graph:
    """A graph over the input ``%x: f32[shape]`` and the dims s and t, from the lines of its body."""
    lines = "".join(f"  {line.strip()}\n" for line in body.strip().splitlines())
    names = [name for name in ("s", "t") if name in shape.replace(" ", "").split(",")]
    dims = "".join(f"  dim {name} in [1, 64]\n" for name in names)
    return parse(f"graph {{\n{dims}  input %x: f32[{shape}]\n{lines}}}\n", weights)


class _Builder:
    """Adds one random op after another, and the plain PyTorch for it."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.graph = Graph()
        self.code: dict[Value, Evaluate] = {}
        names = ("batch", "sequence")[: draw(st.integers(1, 2))]
        self.graph.dims = {name: DimRange(1, 64) for name in names}
        shape: tuple[Size, ...] = (*map(Dim.named, names), draw(st.sampled_from((2, 3, 4))))
        for name in ("x", "y")[: draw(st.integers(1, 2))]:
            self.code[self.graph.add_input(name, TensorType(torch.float32, shape))] = lambda env, n=name: env[n]  # type: ignore[misc]

    def pick(self) -> Value:
        """Any value so far, preferably one of the last."""
        return self.draw(st.sampled_from(list(self.code)[-4:]))

    def weight(self, *shape: int) -> tuple[Value, Tensor]:
        index = len(self.graph.weights)
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(index)) / 2
        return self.graph.add_weight(f"layer.{index}.weight", Weight.of(tensor)), tensor

    def add(self, op: str, args: Mapping[str, object], evaluate: Evaluate) -> None:
        origin = self.draw(st.sampled_from(((), ("layer.0",), ("layer.0", "model.py:3"))))
        self.code[self.graph.insert(f"aten.{op}", args, origin=origin).output] = evaluate

    def unary(self) -> None:
        name, x = self.draw(st.sampled_from(sorted(UNARY))), self.pick()
        of = self.code[x]
        self.add(f"{name}.default", {"self": x}, lambda env: UNARY[name](of(env)))

    def binary(self) -> None:
        name, x = self.draw(st.sampled_from(sorted(BINARY))), self.pick()
        y = self.draw(st.sampled_from([value for value in self.code if value.type == x.type]))
        a, b = self.code[x], self.code[y]
        self.add(f"{name}.Tensor", {"self": x, "other": y}, lambda env: BINARY[name](a(env), b(env)))

    def scaled(self) -> None:
        x, factor = self.pick(), self.draw(st.floats(-4, 4, allow_nan=False))
        of = self.code[x]
        self.add("mul.Tensor", {"self": x, "other": factor}, lambda env: of(env) * factor)

    def linear(self) -> None:
        x = self.pick()
        of, last, out = self.code[x], x.type.shape[-1], self.draw(st.sampled_from((2, 4)))
        if not isinstance(last, int):
            return
        weight, data = self.weight(out, last)
        bias, offset = self.weight(out) if self.draw(st.booleans()) else (None, None)
        args = {"input": x, "weight": weight, "bias": bias}
        self.add("linear.default", args, lambda env: functional.linear(of(env), data, offset))

    def matmul(self) -> None:
        """With a weight, or with its own transpose."""
        x = self.pick()
        of, last = self.code[x], x.type.shape[-1]
        if isinstance(last, int) and self.draw(st.booleans()):
            weight, data = self.weight(last, 2)
            self.add("matmul.default", {"self": x, "other": weight}, lambda env: of(env) @ data)
        elif len(x.type.shape) >= 2:
            swapped = self.graph.insert("aten.transpose.int", {"self": x, "dim0": -2, "dim1": -1}).output
            self.code[swapped] = lambda env: of(env).mT
            self.add("matmul.default", {"self": x, "other": swapped}, lambda env: of(env) @ of(env).mT)

    def reshape(self) -> None:
        """Merge two neighbouring axes."""
        x = self.pick()
        shape = x.type.shape
        if len(shape) < 2:
            return
        of, axis = self.code[x], self.draw(st.integers(0, len(shape) - 2))
        merged = (*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])
        self.add("reshape.default", {"self": x, "shape": merged}, lambda env: of(env).flatten(axis, axis + 1))

    def transpose(self) -> None:
        x = self.pick()
        of, axes = self.code[x], st.integers(0, len(x.type.shape) - 1)
        a, b = self.draw(axes), self.draw(axes)
        self.add("transpose.int", {"self": x, "dim0": a, "dim1": b}, lambda env: of(env).transpose(a, b))

    def cat(self) -> None:
        x = self.pick()
        y = self.draw(st.sampled_from([value for value in self.code if value.type == x.type]))
        a, b, axis = self.code[x], self.code[y], self.draw(st.integers(0, len(x.type.shape) - 1))
        self.add("cat.default", {"tensors": (x, y), "dim": axis}, lambda env: torch.cat([a(env), b(env)], axis))

    def softmax(self) -> None:
        x = self.pick()
        of, axis = self.code[x], self.draw(st.integers(0, len(x.type.shape) - 1))
        self.add("softmax.int", {"self": x, "dim": axis}, lambda env: of(env).softmax(axis))


_STEPS: Sequence[Callable[[_Builder], None]] = (
    _Builder.unary, _Builder.binary, _Builder.scaled, _Builder.linear, _Builder.matmul, _Builder.reshape,
    _Builder.transpose, _Builder.cat, _Builder.softmax,
)  # fmt: skip


@st.composite
def cases(draw: st.DrawFn, most: int = 6) -> Case:
    """Graphs of up to ``most`` steps, every value that nothing reads an output."""
    builder = _Builder(draw)
    for step in draw(st.lists(st.sampled_from(_STEPS), min_size=1, max_size=most)):
        step(builder)
    graph, code = builder.graph, builder.code
    last = [value for value in code if not value.users]
    graph.outputs = {f"out.{index}": value for index, value in enumerate(last)}
    named = dict(graph.outputs)

    def reference(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: code[value](inputs) for name, value in named.items()}

    return Case(graph, reference)
