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
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import graphopt
from graphopt.compiler import _beside
from graphopt.eager import eager
from graphopt.errors import InputError, LoweringError, NoMatchError, ParityError, PipelineError, TracingError
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
    first = "canonicalize" if backend == "torch" else "decompose_complex"
    assert compiled.report.passes[0].kind == first
    assert compiled.report.engine is not None
    assert compiled.report.engine.holds


def test_fused_ops_are_in_the_engine(tmp_path: Path) -> None:
    compiled = graphopt.compile(tiny_llama(), tmp_path / "engine", target=FIXED)
    ops = compiled.report.engine_ops
    assert (ops["Attention"], ops["RotaryEmbedding"], ops["RMSNormalization"], ops["QuickGelu"]) == (2, 4, 5, 2)
    assert "Softmax" not in ops
    model = onnx.load(str(tmp_path / "engine" / "model.onnx"), load_external_data=False)
    assert {value.name for value in model.graph.input} == {"input_ids", "attention_mask"}
    weights = {tensor.name: tensor for tensor in model.graph.initializer if not tensor.name.startswith("constant")}
    external = {name for name, tensor in weights.items() if tensor.data_location == onnx.TensorProto.EXTERNAL}
    assert len(external) == 1 + 2 * 7  # embeddings (tied: once), layers
    assert len(weights.keys() - external) == 2 * 2 + 1 + 1  # norms, rotary frequencies: small ones stand in the model


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
        (
            lambda i: i.update(attention_mask=i["attention_mask"] * 2),
            r"attention_mask holds other numbers than 0 and 1",
        ),
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
    from graphopt.backends.onnx.dialects import STANDARD

    monkeypatch.setitem(STANDARD.lowerings, "aten.gelu", lambda e, node: e.op("Relu", e.value(node.args["self"])))
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


class Draws(torch.nn.Module):
    """A module that draws random numbers, one way or another."""

    def __init__(self, draw: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.draw(x)


def compile_rows(
    module: torch.nn.Module, tmp_path: Path, example: torch.Tensor, backend: str = "onnxruntime"
) -> graphopt.Compiled:
    """A module of ``x`` compiled for any number of rows."""
    source = Source(module.eval(), {"x": example}, {"x": ("batch", *(None,) * (example.ndim - 1))})
    return graphopt.compile(source, tmp_path / "engine", target={"backend": backend, **FIXED})


@pytest.mark.parametrize(
    ("draw", "op"),
    [
        (lambda x: x + torch.rand_like(x), "aten.rand_like"),
        (lambda x: x + torch.randn(3), "aten.randn"),
        (lambda x: x[:, torch.randperm(3)], "aten.randperm"),
        (torch.bernoulli, "aten.bernoulli"),
        (lambda x: torch.nn.functional.dropout(x, 0.5, training=True), "aten.dropout"),
        (lambda x: torch.zeros(3).normal_() + x, "aten.normal_functional"),
        (lambda x: scaled_dot_product_attention(x[:, None], x, x, dropout_p=0.1), "aten.scaled_dot_product_attention"),
    ],
)
def test_chance_is_refused_where_it_is_drawn(draw: Callable[[Any], Any], op: str, tmp_path: Path) -> None:
    example = torch.rand(2, 3, 3) if "attention" in op else torch.rand(2, 3)
    with pytest.raises(TracingError, match=rf"{op}\.default draws random numbers: no two runs are equal") as error:
        compile_rows(Draws(draw), tmp_path, example)
    assert "test_compile.py" in str(error.value.where)
    assert error.value.hint == "switch the model's randomness off, or make the random tensor an input"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: torch.nn.functional.dropout(x, 0.0, training=True),
        lambda x: torch.nn.functional.dropout(x, 0.5, training=False),
        lambda x: x + torch.empty(3).fill_(2.0),
        lambda x: (torch.rand_like(x), x + 1)[1],
    ],
    ids=["no dropout", "evaluation", "empty", "unused"],
)
def test_what_could_have_drawn_and_did_not_is_compiled(draw: Callable[[Any], Any], tmp_path: Path) -> None:
    engine = compile_rows(Draws(draw), tmp_path, torch.rand(2, 3)).engine
    x = torch.rand(5, 3)
    torch.testing.assert_close(engine(x=x)["output"], draw(x))


class Small(torch.nn.Module):
    """One whose every weight is small."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(x)
        return result


@pytest.mark.parametrize("backend", ["onnxruntime", "onnx"])
def test_small_weights_stand_in_the_model_itself(backend: str, tmp_path: Path) -> None:
    module = Small()
    compile_rows(module, tmp_path, torch.rand(2, 3), backend)
    model = onnx.load(str(tmp_path / "engine" / "model.onnx"), load_external_data=False)
    assert not [tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    x = torch.rand(5, 3)
    torch.testing.assert_close(graphopt.load(tmp_path / "engine")(x=x)["output"], module(x))


@pytest.mark.xfail(strict=True, reason="weights_digest is that of the data file, which holds no small weights")
def test_other_weights_have_another_digest(tmp_path: Path) -> None:
    digests = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        digests.add(compile_rows(Small(), tmp_path / name, torch.rand(2, 3)).manifest.weights_digest)
    assert len(digests) == 2


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


def test_calibration_data_lies_beside_the_pipeline_file(tmp_path: Path) -> None:
    file = tmp_path / "pipeline.yaml"
    data = {"kind": "quantize", "scheme": "int8_static", "calibration": {"data": "texts.txt"}}
    assert _beside(data, file) == {**data, "calibration": {"data": str(tmp_path / "texts.txt")}}
    assert _beside({"kind": "canonicalize"}, file) == {"kind": "canonicalize"}
    assert _beside({**data, "calibration": {"data": ["a"]}}, file) == {**data, "calibration": {"data": ["a"]}}


class Weighted(nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x * mask[..., None]


@pytest.mark.parametrize("mask", [None, ""])
def test_a_mask_that_is_none_may_hold_any_numbers(mask: str | None, tmp_path: Path) -> None:
    inputs: dict[str, torch.Tensor | None] = {"x": torch.randn(2, 4, 3), "mask": torch.ones(2, 4)}
    axes = {"x": ("batch", "sequence", None), "mask": ("batch", "sequence")}
    source = Source(Weighted().eval(), inputs, axes, mask=mask)
    engine = graphopt.compile(source, tmp_path / "e", passes=[], dims={"batch": (1, 4), "sequence": (1, 8)}).engine
    x, half = torch.randn(3, 5, 3), torch.full((3, 5), 0.5)
    if mask is None:
        with pytest.raises(InputError, match="mask holds other numbers than 0 and 1"):
            engine(x=x, mask=half)
    else:
        torch.testing.assert_close(engine(x=x, mask=half)["output"], x * 0.5)
