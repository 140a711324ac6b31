"""nn.Module -> Graph: ops in place, wrappers, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.errors import GraphoptError, TracingError
from graphopt.guards import Axes
from graphopt.tracing import source_line, trace
from tests.test_tracing import Calls, Forward, Mlp, Optional, Positions, line_of, of

# In-place ops and wrappers


def chain_in_place(x: Tensor) -> Tensor:
    return x.clone().add_(1).mul_(2)


def assign_columns(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, 1] = x[:, 0]
    y[:, 2:] += 3
    return y


def fill_masked(x: Tensor) -> Tensor:
    y = x * 1
    y.masked_fill_(x > 0, -1.0)
    return y


@pytest.mark.parametrize("fn", [chain_in_place, assign_columns, fill_masked])
def test_in_place_ops_are_functionalized(fn: Forward) -> None:
    graph = of(fn)
    assert not any(op.split(".")[1].endswith("_") for op in graph.op_counts())


def without_gradients(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x * 2
    with torch.autocast("cpu", enabled=False):
        z = y.sin()
    return y + z + 1


def test_gradient_and_autocast_blocks_are_inlined() -> None:
    graph = of(without_gradients)
    assert list(graph.op_counts()) == ["aten.add.Tensor", "aten.mul.Tensor", "aten.sin.default"]


def test_chunks() -> None:
    graph = of(lambda x: x.chunk(3, 1)[2])
    assert [len(node.outputs) for node in graph.nodes] == [3]


# Refusals


def refused(
    fn_or_module: Any, inputs: Mapping[str, Any] | None = None, axes: Axes | None = None, **options: Any
) -> TracingError:
    module = fn_or_module if isinstance(fn_or_module, nn.Module) else Calls(fn_or_module).eval()
    with pytest.raises(TracingError) as error:
        trace(module, inputs or {"x": torch.randn(2, 3)}, {"x": ("b", None)} if axes is None else axes, **options)
    return error.value


def test_training_mode() -> None:
    error = refused(Mlp())
    assert (error.what, error.hint) == ("the module is in training mode", "call module.eval() first")


def test_axes_of_unknown_inputs() -> None:
    assert refused(Optional().eval(), axes={"y": ("b",)}).what == "axes are named for y, which is no given input"
    error = refused(Optional().eval(), {"x": torch.randn(2, 3), "mask": None}, {"x": ("b", None), "mask": ("b", None)})
    assert error.what == "axes are named for mask, which is no given input"


def test_axes_of_another_rank() -> None:
    assert refused(Optional().eval(), axes={"x": ("b",)}).what == "input 'x' has 2 axes, 1 are named"


def test_dims_that_no_axis_has() -> None:
    error = refused(Optional().eval(), dims={"c": (1, 2)})
    assert error.what == "dims names c, which no axis of any input has"


def test_unknown_inputs() -> None:
    error = refused(Optional().eval(), {"z": torch.randn(2, 3)}, {})
    assert error.what == "torch.export cannot trace Optional: missing a required argument: 'x'"


def test_an_example_of_size_one() -> None:
    error = refused(lambda x: x + 1, {"x": torch.randn(1, 3)})
    assert error.what == "example input 'x' has size 1 at its dynamic axis 0"
    assert error.hint == "trace with an example of at least 2 there: torch takes 0 and 1 for constants"


def test_axis_fixed_by_the_model() -> None:
    error = refused(lambda x: x + torch.ones(2, 3))
    assert error.what.startswith("torch.export cannot trace Calls: Constraints violated (L['x'].size()[0])")
    assert (
        error.hint == "the model fixes a size that is named dynamic: leave that axis out of axes, or change the model"
    )


def test_axes_that_are_always_equal_need_one_name() -> None:
    error = refused(lambda x: x @ x, {"x": torch.randn(4, 4)}, {"x": ("b", "c")})
    assert (error.what, error.where) == ("c and b are always equal in this model", "axis 1 of 'x'")
    assert error.hint == "give them one name"


@pytest.mark.parametrize(("bounds", "asked"), [((1, 16), "[1, 16]"), ((1, None), "[1, ...]")])
def test_dims_outside_the_models_range(bounds: tuple[int, int | None], asked: str) -> None:
    error = refused(Positions().eval(), axes={"x": ("s", None)}, dims={"s": bounds})
    assert error.what == f"dims asks for s in {asked}, the model allows [0, 8]"
    assert (error.where, error.hint) == ("axis 0 of 'x'", "set dims: {s: [1, 8]}")


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x + 1
        return x - 1


def test_data_dependent_control_flow() -> None:
    error = refused(Branches().eval())
    assert error.what.startswith("torch.export cannot trace Branches: Could not guard on data-dependent expression")
    assert error.where == line_of(Branches.forward, 1)
    assert error.hint == "a size or branch depends on tensor values: rewrite it with torch.where or fixed sizes"


class CountsNonzero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.nonzero()


class Picks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0]


@pytest.mark.parametrize(("module", "name"), [(CountsNonzero, "%nonzero"), (Picks, "%index")])
def test_data_dependent_sizes(module: type[nn.Module], name: str) -> None:
    error = refused(module().eval())
    assert error.what == "the size u0 depends on data, not on the inputs' shapes"
    assert error.where == f"{name} | {line_of(module.forward, 1)}"
    assert error.hint == "make the size a function of the inputs' shapes"


class ReadsAnItem(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.sum().item()


def test_data_dependent_numbers() -> None:
    assert line_of(ReadsAnItem.forward, 1) in str(refused(ReadsAnItem().eval()).where)


class Conditional(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))


def test_torch_cond() -> None:
    error = refused(Conditional().eval())
    assert error.what == "cond is control flow, which a graph cannot hold"
    assert error.hint == "rewrite it with torch.where, or compile the branches apart"
    assert error.where == f"%cond | {line_of(Conditional.forward, 1)}"


class RootOfASize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.div(x, x.shape[0] ** 0.5)


def test_sizes_without_a_form() -> None:
    error = refused(RootOfASize().eval())
    assert error.what == "sym_float has no form in a graph"
    assert error.where == f"%sym_float | {line_of(RootOfASize.forward, 1)}"


class PairsUp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 2, 3)


def test_sizes_that_must_be_even() -> None:
    error = refused(PairsUp().eval(), {"x": torch.randn(4, 3)})
    assert line_of(PairsUp.forward, 1) in str(error.where)


def test_inputs_that_are_written() -> None:
    error = refused(lambda x: x.add_(1))
    assert error.what == "the module writes into 'x' (USER_INPUT_MUTATION)"
    assert error.hint == "do not change inputs in place"


@dataclass
class Unregistered:
    y: Tensor


def test_outputs_of_an_unregistered_type() -> None:
    error = refused(lambda x: Unregistered(x + 1))
    assert "Unregistered" in error.what
    assert error.hint == "return tensors, tuples, dicts or registered dataclasses only"


@pytest.mark.parametrize("name", ["seq-len", "2s", "inf", "None", "a b", "f32"])
def test_axes_whose_names_are_no_names_of_sizes(name: str) -> None:
    """Their graph could not be read back from its text."""
    with pytest.raises(GraphoptError, match=name):
        trace(Calls(lambda x: x + 1).eval(), {"x": torch.randn(2, 3)}, {"x": (name, None)})


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("/usr/lib/python3/site-packages/transformers/bert.py", "transformers/bert.py:7"),
        ("/somewhere/else/model.py", "model.py:7"),
        ("model.py", "model.py:7"),
    ],
)
def test_source_lines_are_short(file: str, expected: str) -> None:
    assert source_line(file, 7) == expected
