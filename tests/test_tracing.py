"""nn.Module -> Graph: what tiny modules become, and that the graph computes the same."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.modeling_outputs import BaseModelOutput

from graphopt.eager import eager, kept, path_name
from graphopt.errors import GraphoptError
from graphopt.execution import run
from graphopt.guards import Axes
from graphopt.ir import Graph
from graphopt.tensors import DimRange
from graphopt.text import parse
from graphopt.tracing import trace

Forward = Callable[..., Any]


class Calls(nn.Module):
    """A module whose forward is a function of x."""

    def __init__(self, fn: Forward) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Any:
        return self.fn(x)


def line_of(fn: Forward, offset: int = 0) -> str:
    """The source line of a function, as errors name it."""
    file = Path(inspect.getsourcefile(fn) or "").name
    return f"tests/{file}:{inspect.getsourcelines(fn)[1] + offset}"


def sample(example: Tensor, names: tuple[str | None, ...], sizes: Mapping[str, int]) -> Tensor:
    shape = [sizes[name] if name else size for name, size in zip(names, example.shape, strict=True)]
    return torch.randn(shape) if example.is_floating_point() else torch.randint(0, 4, shape)


def traced(module: nn.Module, inputs: Mapping[str, Tensor | None], axes: Axes, **options: Any) -> Graph:
    """The graph, after it was found equal to the module at the traced sizes and at two others."""
    module.eval()
    graph = trace(module, inputs, axes, **options)
    names = sorted({name for names in axes.values() for name in names if name})
    examples = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    others: list[dict[str, Tensor]] = [
        {
            name: sample(example, tuple(axes.get(name, (None,) * example.ndim)), sizes)
            for name, example in examples.items()
        }
        for sizes in ({n: 4 + i for i, n in enumerate(names)}, {n: 7 - 2 * i for i, n in enumerate(names)})
    ]
    for given in (examples, *others):
        expected = eager(module)(**dict.fromkeys(inputs) | {k: v.clone() for k, v in given.items()})
        found = run(graph, given)
        assert found.keys() == expected.keys()
        torch.testing.assert_close(found, expected)
    assert parse(str(graph)) == graph
    return graph


def of(fn: Forward) -> Graph:
    """The graph of a function of ``x: f32[b, 3]``."""
    return traced(Calls(fn), {"x": torch.randn(2, 3)}, {"x": ("b", None)})


def lines(graph: Graph) -> list[str]:
    return [line.strip() for line in graph.text().splitlines()[1:-1]]


# What becomes of a module


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Dropout(0.5), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x) + x
        return result


def test_golden() -> None:
    graph = traced(Mlp(), {"x": torch.randn(2, 6, 3)}, {"x": ("batch", "sequence", None)})
    assert lines(graph) == [
        "dim batch in [1, ...]",
        "dim sequence in [1, ...]",
        "input %x: f32[batch, sequence, 3]",
        "weight %layers.0.weight: f32[5, 3]",
        "weight %layers.0.bias: f32[5]",
        "weight %layers.3.weight: f32[3, 5]",
        "weight %layers.3.bias: f32[3]",
        "%linear: f32[batch, sequence, 5] = aten.linear.default(input=%x, weight=%layers.0.weight, bias=%layers.0.bias)",
        "%gelu: f32[batch, sequence, 5] = aten.gelu.default(self=%linear)",
        "%linear_1: f32[batch, sequence, 3] = "
        "aten.linear.default(input=%gelu, weight=%layers.3.weight, bias=%layers.3.bias)",
        "%add: f32[batch, sequence, 3] = aten.add.Tensor(self=%linear_1, other=%x)",
        "output output = %add",
    ]


def test_origins_are_module_path_and_source_line() -> None:
    graph = trace(Mlp().eval(), {"x": torch.randn(2, 3)}, {"x": ("b", None)})
    origins = [node.origin for node in graph.nodes]
    assert [origin[0] for origin in origins[:3]] == ["layers.0", "layers.1", "layers.3"]
    assert origins[3] == (line_of(Mlp.forward, 1),)


def test_weights_are_the_modules_own_tensors() -> None:
    module = Mlp()
    graph = traced(module, {"x": torch.randn(2, 3)}, {"x": ("b", None)})
    for name, parameter in module.named_parameters():
        assert graph.weights[name].load().data_ptr() == parameter.data_ptr()


def test_constants_are_lifted() -> None:
    graph = of(lambda x: x + torch.tensor([1.0, 2.0, 3.0]))
    assert [(name, weight.load().tolist()) for name, weight in graph.weights.items()] == [
        ("lifted_tensor_0", [1.0, 2.0, 3.0])
    ]


class Buffers(nn.Module):
    kept: Tensor
    passing: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.randn(3))
        self.register_buffer("passing", torch.randn(3), persistent=False)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(x * self.kept + self.passing)
        return result


class Namesake(nn.Module):
    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.randn(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x * self.mask + mask


def test_a_buffer_may_be_named_as_an_input_is() -> None:
    inputs = {"x": torch.randn(2, 3), "mask": torch.randn(2, 3)}
    graph = traced(Namesake(), inputs, {"x": ("b", None), "mask": ("b", None)})
    assert list(graph.inputs) == ["x", "mask"]
    assert list(graph.weights) == ["self.mask"]


def test_buffers_are_weights() -> None:
    graph = traced(Buffers(), {"x": torch.randn(2, 3)}, {"x": ("b", None)})
    assert set(graph.weights) == {
        "kept", "passing", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var",
    }  # fmt: skip


class Counts(nn.Module):
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return x + self.count


def test_a_buffer_that_is_written_starts_anew_with_every_call() -> None:
    graph = trace(Counts().eval(), {"x": torch.zeros(2, 3)}, {"x": ("b", None)})
    for _ in range(2):
        torch.testing.assert_close(run(graph, {"x": torch.zeros(2, 3)})["output"], torch.ones(2, 3))
    assert torch.equal(graph.weights["count"].load(), torch.zeros(1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embed(ids))
        return logits


def test_tied_weights_are_one() -> None:
    graph = traced(Tied(), {"ids": torch.zeros(2, 4, dtype=torch.long)}, {"ids": ("b", "s")})
    assert list(graph.weights) == ["embed.weight"]
    assert sum(graph.value("embed.weight").users.values()) == 2


def test_equal_but_separate_weights_stay_separate() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.a + self.b

    assert list(traced(Twins(), {"x": torch.randn(2, 3)}, {"x": ("b", None)}).weights) == ["a", "b"]


def test_no_ops_and_assertions_do_not_come_in() -> None:
    graph = of(lambda x: nn.functional.dropout(x.to(torch.float32).contiguous().clone(), 0.5, False).detach() + 1)
    assert graph.op_counts() == {"aten.add.Tensor": 1}


# Outputs


@pytest.mark.parametrize(
    ("fn", "names"),
    [
        (lambda x: x + 1, ["output"]),
        (lambda x: (x + 1, x * 2), ["output.0", "output.1"]),
        (lambda x: [x + 1, (x * 2, x * 3)], ["output.0", "output.1.0", "output.1.1"]),
        (lambda x: {"logits": x + 1, "hidden": (x * 2, x * 3)}, ["logits", "hidden.0", "hidden.1"]),
        (
            lambda x: BaseModelOutput(last_hidden_state=x + 1, hidden_states=(x * 2, x * 3)),
            ["last_hidden_state", "hidden_states.0", "hidden_states.1"],
        ),
        (lambda x: (x + 1, None), ["output.0"]),
        (lambda x: (x + 1, 3, x.shape[0]), ["output.0"]),
    ],
    ids=["tensor", "tuple", "nested", "dict", "ModelOutput", "None", "numbers"],
)
def test_outputs_are_named_by_their_place(fn: Forward, names: list[str]) -> None:
    assert list(of(fn).outputs) == names


@dataclass
class Pair:
    left: Tensor
    right: Tensor


def test_registered_dataclasses_are_outputs() -> None:
    torch.export.register_dataclass(Pair, serialized_type_name="tests.test_tracing.Pair")
    assert list(of(lambda x: Pair(x + 1, x * 2)).outputs) == ["left", "right"]


def test_one_value_may_be_returned_twice() -> None:
    def twice(x: Tensor) -> Any:
        y = x + 1
        return {"a": y, "b": (y, x * 2)}

    graph = of(twice)
    assert {name: value.name for name, value in graph.outputs.items()} == {"a": "add", "b.0": "add", "b.1": "mul"}


def test_an_input_may_be_returned() -> None:
    graph = of(lambda x: {"x": x, "y": x + 1})
    assert graph.outputs["x"] is graph.inputs["x"]


def test_a_weight_may_be_returned() -> None:
    constant = torch.tensor([1.0, 2.0])
    assert lines(of(lambda x: (x + 1, constant * 1)))[-1].startswith("output output.1 = %")


def test_outputs_whose_names_fall_together_are_refused() -> None:
    with pytest.raises(GraphoptError, match=r"a\.b"):
        of(lambda x: {"a": {"b": x + 1}, "a.b": x * 2})


def test_path_names() -> None:
    tree = {"a": [0, {"b": 1}], "c": 2}
    assert [path_name(path) for path, _ in pytree.tree_flatten_with_path(tree)[0]] == ["a.0", "a.1.b", "c"]
    assert path_name(()) == "output"


def test_eager_names_the_same_outputs_and_needs_no_gradients() -> None:
    module = Calls(lambda x: {"y": x + 1, "none": None, "z": (x,)})
    found = eager(module)(x=torch.ones(1, requires_grad=True))
    assert list(found) == ["y", "z.0"]
    assert not found["y"].requires_grad
    assert list(kept(found, {"z.0": None})) == ["z.0"]


# Inputs


class Optional(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        x = x * 2 if mask is None else x * mask
        return x if bias is None else x + bias


def test_optional_inputs_may_be_left_out() -> None:
    graph = traced(Optional(), {"x": torch.randn(2, 3), "mask": None}, {"x": ("b", None)})
    assert list(graph.inputs) == ["x"]
    axes = {"x": ("b", None), "bias": ("b", None)}
    graph = traced(Optional(), {"x": torch.randn(2, 3), "mask": None, "bias": torch.randn(2, 3)}, axes)
    assert list(graph.inputs) == ["x", "bias"]


def test_inputs_may_come_in_another_order() -> None:
    axes = {"x": ("b", None), "mask": ("b", None)}
    graph = traced(Optional(), {"mask": torch.randn(2, 3), "x": torch.randn(2, 3)}, axes)
    assert set(graph.inputs) == {"x", "mask"}


def test_axes_of_one_name_are_one_size() -> None:
    axes = {"x": ("b", None), "mask": ("b", None)}
    graph = traced(Optional(), {"x": torch.randn(2, 3), "mask": torch.randn(2, 3)}, axes)
    assert graph.dims == {"b": DimRange(1, None)}
    assert str(graph.inputs["x"].type) == str(graph.inputs["mask"].type) == "f32[b, 3]"


def test_axes_of_one_size_but_two_names_stay_two() -> None:
    graph = traced(Calls(lambda x: x * 2), {"x": torch.randn(4, 4)}, {"x": ("b", "c")})
    assert str(graph.inputs["x"].type) == "f32[b, c]"


def test_inputs_may_have_the_names_of_python_builtins() -> None:
    class Builtins(nn.Module):
        def forward(self, input: Tensor, type: Tensor) -> Tensor:
            return input + type

    axes = {"input": ("b", None), "type": ("b", None)}
    graph = traced(Builtins(), {"input": torch.randn(2, 3), "type": torch.randn(2, 3)}, axes)
    assert list(graph.inputs) == ["input", "type"]


def test_inputs_without_axes_are_fixed() -> None:
    graph = traced(Calls(lambda x: x + 1), {"x": torch.randn(2, 3)}, {})
    assert str(graph.inputs["x"].type) == "f32[2, 3]"
    assert graph.dims == {}


def test_ranges_of_dims() -> None:
    inputs, axes = {"x": torch.randn(2, 3)}, {"x": ("b", None)}
    assert trace(Calls(lambda x: x + 1).eval(), inputs, axes).dims == {"b": DimRange(1, None)}
    assert trace(Calls(lambda x: x + 1).eval(), inputs, axes, {"b": (2, 9)}).dims == {"b": DimRange(2, 9)}
    assert trace(Calls(lambda x: x + 1).eval(), inputs, axes, {"b": DimRange(1, None)}).dims == {"b": DimRange()}


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table[: x.shape[0]]


def test_the_models_own_range_bounds_a_dim() -> None:
    inputs, axes = {"x": torch.randn(2, 3)}, {"x": ("s", None)}
    graph = traced(Positions(), inputs, axes)
    assert graph.dims == {"s": DimRange(1, 8)}
    assert traced(Positions(), inputs, axes, dims={"s": (1, 8)}).dims == {"s": DimRange(1, 8)}


@pytest.mark.parametrize(
    ("default", "expected"),
    [
        (DimRange(1, 16), DimRange(1, 8)),
        (DimRange(1, 5), DimRange(1, 5)),
        (DimRange(3, None), DimRange(3, 8)),
        (DimRange(1, 8), DimRange(1, 8)),
    ],
)
def test_defaults_give_way_to_the_models_range(default: DimRange, expected: DimRange) -> None:
    inputs, axes = {"x": torch.randn(4, 3)}, {"x": ("s", None)}
    assert trace(Positions().eval(), inputs, axes, defaults={"s": default}).dims == {"s": expected}


def test_dims_come_before_defaults() -> None:
    inputs, axes = {"x": torch.randn(4, 3)}, {"x": ("s", None)}
    graph = trace(Positions().eval(), inputs, axes, {"s": (2, 6)}, {"s": DimRange(1, 3), "other": DimRange(1, 2)})
    assert graph.dims == {"s": DimRange(2, 6)}


def test_inputs_that_hold_truths_are_noted() -> None:
    inputs = {"x": torch.randn(2, 3), "mask": torch.ones(2, 3)}
    graph = trace(Optional().eval(), inputs, {"x": ("b", None), "mask": ("b", None)}, truths=("mask", "unknown"))
    assert graph.truths == {"mask"}


def test_sizes_become_expressions() -> None:
    graph = of(lambda x: torch.arange(2 * x.shape[0] + 1) / x.shape[0])
    assert lines(graph)[2] == "%arange: i64[2*b + 1] = aten.arange.start_step(start=0, end=2*b + 1, dtype=i64)"
    assert lines(graph)[3] == "%div: f32[2*b + 1] = aten.div.Tensor(self=%arange, other=b)"
