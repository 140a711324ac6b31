"""Model to engine directory, on every backend, against eager."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import graphopt
from graphopt.eager import eager
from graphopt.errors import InputError, LoweringError, NoMatchError, ParityError, PipelineError
from graphopt.ir import Graph, Value
from graphopt.patterns import Ops, TensorHole
from graphopt.pipeline import Pass, RulePass
from graphopt.rewrite import Build, Match, Rule
from graphopt.schemas.pipeline import Budget
from graphopt.sources import Source
from graphopt.testing import assert_parity
from tests.tiny import tiny_bert, tiny_llama

FIXED = {"tactics": "fixed"}


def inputs_at(source: Source, batch: int, sequence: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return source.sample()({"batch": batch, "sequence": sequence}, generator)


@pytest.mark.parametrize("backend", ["onnxruntime", "onnx", "torch"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("make", [tiny_bert, tiny_llama])
def test_engine_is_the_model(make: Callable[[str], Source], attention: str, backend: str, tmp_path: Path) -> None:
    source = make(attention)
    compiled = graphopt.compile(source, tmp_path / "engine", target={"backend": backend, **FIXED})
    engine = graphopt.load(tmp_path / "engine")
    for batch, sequence in ((1, 1), (3, 11), (2, 40)):
        inputs = inputs_at(source, batch, sequence)
        assert_parity(eager(source.module)(**inputs), engine(**inputs), mask=inputs["attention_mask"], max_abs=1e-5)
    assert compiled.report.passes[0].kind == "canonicalize"
    assert compiled.report.engine is not None
    assert compiled.report.engine.holds


def test_fused_ops_are_in_the_engine(tmp_path: Path) -> None:
    compiled = graphopt.compile(tiny_llama(), tmp_path / "engine", target=FIXED)
    ops = compiled.report.engine_ops
    assert (ops["Attention"], ops["RotaryEmbedding"], ops["RMSNormalization"], ops["QuickGelu"]) == (2, 4, 5, 2)
    assert "Softmax" not in ops
    model = onnx.load(str(tmp_path / "engine" / "model.onnx"), load_external_data=False)
    assert {value.name for value in model.graph.input} == {"input_ids", "attention_mask"}
    external = [tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    assert len(external) == 1 + 2 * 9 + 1 + 1  # embeddings (tied: once), layers, norm, rotary frequencies


def test_numpy_in_numpy_out(tmp_path: Path) -> None:
    source = tiny_bert()
    engine = graphopt.compile(source, tmp_path / "engine", target=FIXED).engine
    inputs = inputs_at(source, 2, 5)
    as_torch = engine(**inputs)
    as_numpy = engine(**{name: tensor.numpy() for name, tensor in inputs.items()})
    assert isinstance(as_torch["last_hidden_state"], torch.Tensor)
    assert isinstance(as_numpy["last_hidden_state"], np.ndarray)
    np.testing.assert_array_equal(as_torch["last_hidden_state"].numpy(), as_numpy["last_hidden_state"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.pop("attention_mask"), r"missing input: attention_mask"),
        (lambda i: i.update(extra=torch.ones(1)), r"unknown input: extra"),
        (lambda i: i.update(input_ids=i["input_ids"].int()), r"input 'input_ids' has dtype i32, needs i64"),
        (lambda i: i.update(input_ids=i["input_ids"][0]), r"input 'input_ids' has shape \[5\], needs 2 dimensions"),
        (
            lambda i: i.update(attention_mask=i["attention_mask"][:, :4]),
            r"size 4 at axis 1, needs 5 \(sequence, from input_ids",
        ),
        (lambda i: i.update(input_ids=[[1]]), r"input 'input_ids' is a list"),
        (lambda i: i.update({k: v.repeat(1, 20) for k, v in i.items()}), r"sequence is 100, outside \[1, 64\]"),
    ],
)
def test_wrong_inputs(
    change: Callable[[dict[str, Any]], Any], message: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "wrong-inputs"
    source = tiny_bert(layers=1)
    if not folder.exists():
        graphopt.compile(source, folder, target=FIXED)
    inputs: dict[str, Any] = dict(inputs_at(source, 2, 5))
    change(inputs)
    with pytest.raises(InputError, match=message):
        graphopt.load(folder)(**inputs)


class Broken(Rule):
    """gelu(x)  ->  relu(x), which is wrong"""

    def pattern(self, op: Ops, x: TensorHole) -> Any:
        return op.gelu(x)

    def rewrite(self, op: Build, m: Match) -> Value:
        result: Value = op.relu(m.x)
        return result


class BreakGelu(RulePass):
    """A wrong pass."""

    kind: str = "break_gelu"

    def rules(self) -> list[Rule]:
        return [Broken()]


BROKEN: list[Mapping[str, Any] | Pass] = [{"kind": "canonicalize"}, BreakGelu()]


def test_a_wrong_pass_is_named_with_the_first_wrong_value(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="break_gelu breaks its contract") as error:
        graphopt.compile(tiny_bert(), tmp_path / "engine", passes=BROKEN, target=FIXED)
    assert error.value.where is not None
    assert "%gelu differs" in error.value.where
    assert "encoder.layer.0.intermediate" in error.value.where
    assert list(tmp_path.iterdir()) == []


def test_force_writes_the_broken_contract_down(tmp_path: Path) -> None:
    compiled = graphopt.compile(tiny_bert(), tmp_path / "engine", passes=BROKEN, target=FIXED, force=True)
    stages = [step.parity for step in compiled.report.passes]
    assert [stage.holds for stage in stages if stage] == [True, False]
    assert not graphopt.load(tmp_path / "engine").manifest.report.passes[1].parity.holds  # type: ignore[union-attr]


def test_a_budget_allows_it(tmp_path: Path) -> None:
    budget = Budget(metric="cosine", limit=0.5)
    compiled = graphopt.compile(tiny_bert(), tmp_path / "engine", passes=BROKEN, target=FIXED, parity=budget)
    assert compiled.report.engine is not None
    assert (compiled.report.engine.contract, compiled.report.engine.holds) == ("cosine 0.5", True)


def test_a_wrong_engine_is_bisected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lowering that is wrong is found on the engine, with the node that it lowers."""
    from graphopt.backends.onnx import lowerings

    monkeypatch.setitem(lowerings.LOWERINGS, "aten.gelu", lambda e, node: e.op("Relu", e.value(node.args["self"])))
    with pytest.raises(ParityError, match="the engine breaks its contract") as error:
        graphopt.compile(tiny_bert(), tmp_path / "engine", target=FIXED)
    assert error.value.where is not None
    assert re.match(r"%gelu\w* differs", error.value.where)
    assert list(tmp_path.iterdir()) == []


def test_a_pass_without_a_match_is_an_error(tmp_path: Path) -> None:
    steps: list[Mapping[str, Any] | Pass] = [{"kind": "canonicalize"}, {"kind": "fuse_activation", "gated": False}]
    with pytest.raises(NoMatchError, match="fuse_activation changed nothing") as error:
        graphopt.compile(tiny_bert(), tmp_path / "engine", passes=steps, target=FIXED)
    assert "allow_no_match" in str(error.value.hint)


def test_an_op_without_lowering(tmp_path: Path) -> None:
    class Bessel(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = torch.special.bessel_j0(x)
            return result

    source = Source(Bessel().eval(), {"x": torch.rand(2, 3)}, {"x": ("batch", None)})
    with pytest.raises(LoweringError, match=r"special_bessel_j0 cannot be expressed") as error:
        graphopt.compile(source, tmp_path / "engine", passes=[], target=FIXED)
    assert "test_compile.py" in str(error.value.where)
    assert list(tmp_path.iterdir()) == []


def test_several_outputs_and_an_optional_input(tmp_path: Path) -> None:
    class Pair(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> dict[str, Any]:
            z = x if y is None else x + y
            return {"sum": z, "parts": (z * 2, z.sum(-1))}

    source = Source(Pair().eval(), {"x": torch.rand(2, 3), "y": None}, {"x": ("batch", None)})
    engine = graphopt.compile(source, tmp_path / "engine", passes=[], target=FIXED).engine
    outputs = engine(x=torch.ones(4, 3))
    assert {name: tuple(tensor.shape) for name, tensor in outputs.items()} == {
        "sum": (4, 3),
        "parts.0": (4, 3),
        "parts.1": (4,),
    }


def test_unknown_backend_and_option(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="there is no backend 'onnxruntim'") as error:
        graphopt.compile(tiny_bert(), tmp_path / "engine", target={"backend": "onnxruntim"})
    assert "did you mean 'onnxruntime'" in str(error.value.hint)
    with pytest.raises(PipelineError, match="there is no option 'tun'; did you mean 'tune'"):
        graphopt.compile(tiny_bert(), tmp_path / "engine", target={"options": {"tun": []}})


def test_timed_tactics_are_reported_and_kept(tmp_path: Path) -> None:
    target = {"options": {"tune": [{"batch": 1, "sequence": 8}]}}
    first = graphopt.compile(tiny_bert(), tmp_path / "a", target=target).report.tactics
    again = graphopt.compile(tiny_bert(), tmp_path / "b", target=target).report.tactics
    assert [(tactic.how, tactic.uses) for tactic in first] == [("timed", 2)]
    assert [(tactic.how, tactic.chosen) for tactic in again] == [("timed before", first[0].chosen)]
    timed = {form: time for form, time in first[0].milliseconds.items() if time is not None}
    assert min(timed, key=lambda form: timed[form]) == first[0].chosen


def test_verify_again(tmp_path: Path) -> None:
    source = tiny_bert()
    graphopt.compile(source, tmp_path / "engine", target=FIXED)
    assert graphopt.verify(tmp_path / "engine", source).holds
    torch.nn.init.normal_(source.module.get_parameter("encoder.layer.0.intermediate.dense.weight"))
    assert not graphopt.verify(tmp_path / "engine", source).holds


def test_graph_of_an_engine_parses(tmp_path: Path) -> None:
    from graphopt.artifact import read_graph

    graphopt.compile(tiny_bert(), tmp_path / "engine", target=FIXED)
    graph = read_graph(tmp_path / "engine")
    assert isinstance(graph, Graph)
    graph.verify()
