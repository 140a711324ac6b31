"""graphopt.testing: assert_parity and the parity fixture compare what there is, and say so where there is nothing."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from graphopt.rewrite import Rule, apply_rules
from graphopt.runtime.engine import to_numpy, to_torch
from graphopt.testing import ParityRecorder, assert_parity
from tests.graphs import graph_of


@dataclass
class Output:
    logits: Tensor
    loss: float = 0.0


@pytest.mark.parametrize(
    ("reference", "candidate", "message"),
    [
        (1.0, 2.0, "nothing was compared: there is no tensor or array in the reference, a float"),
        (None, None, "nothing was compared"),
        ({}, {"x": torch.ones(1)}, "nothing was compared"),
        (SimpleNamespace(logits=torch.zeros(3)), SimpleNamespace(logits=torch.ones(3)), "a SimpleNamespace"),
        ({"loss": np.float32(1)}, {"loss": np.float32(2)}, "largest difference 1 of the scale"),
        (np.float32(1), np.float32(2), "largest difference 1 of the scale"),
        (Output(torch.ones(2)), Output(torch.zeros(2)), "logits .*largest difference 1 of the scale"),
        ((torch.ones(2), torch.ones(2)), torch.ones(2), r"output 'output\.0' is missing\n.*there are output"),
        ({"y": torch.ones(2)}, {}, "output 'y' is missing\n.*there are none"),
    ],
)
def test_what_is_no_parity(reference: Any, candidate: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_parity(reference, candidate)


def test_a_mask_that_leaves_nothing() -> None:
    with pytest.raises(AssertionError, match="no element of output is left by the mask"):
        assert_parity(torch.zeros(2, 3), torch.ones(2, 3), mask=torch.zeros(2, 3))


def test_outputs_of_dataclasses_and_numbers_of_numpy() -> None:
    assert list(assert_parity(Output(torch.ones(2)), Output(torch.ones(2)))) == ["logits"]
    assert assert_parity(np.float32(1), torch.tensor(1.0))["output"].compared == 1


def test_the_fixture_wants_all_outputs_but_those_of_a_cache(parity: ParityRecorder) -> None:
    inputs = {"x": torch.ones(2)}

    def model(x: Tensor) -> dict[str, Tensor]:
        return {"y": x, "z": x + 1, "past_key_values.0": x}

    assert list(parity(model, lambda x: {"y": x, "z": x + 1}, inputs)) == ["y", "z"]
    with pytest.raises(AssertionError, match="output 'z' is missing"):
        parity(model, lambda x: {"y": x}, inputs)


@pytest.mark.parametrize("dtype", [">f4", "<f4", ">i8", ">f8"])
def test_arrays_of_either_byte_order(dtype: str) -> None:
    array = np.array([1, 2, 3], dtype)
    assert to_numpy(array).dtype.isnative
    assert to_torch(array).tolist() == [1, 2, 3]
    assert to_numpy(array).tolist() == [1, 2, 3]


class Misspelt(Rule):
    def pattern(self, op: Any, x: Any) -> Any:
        return op.sigmoidd(x)

    def rewrite(self, op: Any, m: Any) -> Any:
        return m.x


class Unknown(Misspelt):
    def pattern(self, op: Any, x: Any) -> Any:
        return op.tanh(x)

    def rewrite(self, op: Any, m: Any) -> Any:
        return op.tanhh(m.x)


@pytest.mark.parametrize(("rule", "hint"), [(Misspelt, "did you mean 'sigmoid'"), (Unknown, "did you mean 'tanh'")])
def test_ops_that_there_are_none_of(rule: type[Rule], hint: str) -> None:
    graph = graph_of("%y: f32[s, 4] = aten.tanh.default(self=%x)\noutput y = %y")
    with pytest.raises(Exception, match="there is no torch op aten") as error:
        apply_rules(graph, [rule()], "test")
    assert hint in str(error.value)


def test_ops_of_ones_own_namespace_match_and_are_built() -> None:
    with torch.library._scoped_library("graphopt_test", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        torch.library.impl(library, "twice", "CompositeImplicitAutograd")(lambda x: x * 2)

        class Own(Rule):
            def pattern(self, op: Any, x: Any) -> Any:
                return op.tanh(x)

            def rewrite(self, op: Any, m: Any) -> Any:
                return op.graphopt_test.twice(m.x)

        class Back(Rule):
            def pattern(self, op: Any, x: Any) -> Any:
                return op.graphopt_test.twice(x)

            def rewrite(self, op: Any, m: Any) -> Any:
                return op.sin(m.x)

        graph = graph_of("%y: f32[s, 4] = aten.tanh.default(self=%x)\noutput y = %y")
        assert apply_rules(graph, [Own()], "test").total == 1
        assert [node.op for node in graph.nodes] == ["graphopt_test.twice.default"]
        assert apply_rules(graph, [Back()], "test").total == 1
        assert [node.op for node in graph.nodes] == ["aten.sin.default"]
