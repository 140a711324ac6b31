"""Models of transformers through the passes: what is fused in each, and that it stays what eager computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from graphopt import trace
from graphopt.compiler import make_proof
from graphopt.eager import eager
from graphopt.execution import run
from graphopt.ir import Graph, Node
from graphopt.pipeline import load_passes, run_passes
from graphopt.schemas.report import PassReport
from graphopt.sources import Source, transformers_source
from graphopt.testing import assert_parity

LAYERS = 2
COMMON: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GROUPED = COMMON | {"num_key_value_heads": 2}
DISTIL: dict[str, Any] = {
    "vocab_size": 99,
    "dim": 32,
    "n_layers": LAYERS,
    "n_heads": 4,
    "hidden_dim": 48,
    "max_position_embeddings": 64,
}
PASSES = ("canonicalize", "fuse_attention", "fuse_norm", "fuse_activation", "heads_last", "flatten_tokens")


@dataclass(frozen=True)
class Expected:
    """A model and what the passes find in it; counts for all layers together."""

    make: Callable[[str], torch.nn.Module]
    causal: str = "none"
    window_left: int = -1
    rotary: int = 0
    rms_norm: int = 0
    add_rms_norm: int = 0
    layer_norm: int = 0
    add_layer_norm: int = 0
    gelu: int = 0
    gated: int = 0


def encoder(name: str, config: str, **options: Any) -> Callable[[str], torch.nn.Module]:
    """What makes the model with a spelling of attention."""

    def make(attention: str) -> torch.nn.Module:
        torch.manual_seed(0)
        made = getattr(transformers, config)(**options, attn_implementation=attention)
        model: torch.nn.Module = getattr(transformers, name)(made)
        return model

    return make


LIKE_LLAMA: dict[str, Any] = {
    "causal": "upper_left",
    "rotary": 2 * LAYERS,
    "rms_norm": 1,
    "add_rms_norm": 2 * LAYERS,
    "gated": LAYERS,
}
LIKE_BERT: dict[str, Any] = {"layer_norm": 1, "add_layer_norm": 2 * LAYERS, "gelu": LAYERS}
MODELS = {
    "bert": Expected(encoder("BertModel", "BertConfig", **COMMON), **LIKE_BERT),
    "roberta": Expected(
        encoder("RobertaModel", "RobertaConfig", **COMMON, pad_token_id=1),
        **(LIKE_BERT | {"layer_norm": 0, "add_layer_norm": 2 * LAYERS + 1}),
    ),
    "distilbert": Expected(encoder("DistilBertModel", "DistilBertConfig", **DISTIL), **LIKE_BERT),
    "llama": Expected(encoder("LlamaForCausalLM", "LlamaConfig", **GROUPED), **LIKE_LLAMA),
    "qwen2": Expected(encoder("Qwen2ForCausalLM", "Qwen2Config", **GROUPED), **LIKE_LLAMA),
    "mistral": Expected(
        encoder("MistralForCausalLM", "MistralConfig", **GROUPED, sliding_window=4), window_left=3, **LIKE_LLAMA
    ),
}
SPELLINGS = ("eager", "sdpa")


@dataclass(frozen=True)
class Optimized:
    source: Source
    graph: Graph
    reports: tuple[PassReport, ...]


@cache
def optimized(name: str, attention: str) -> Optimized:
    """The model after every pass, each proven against eager."""
    source = transformers_source(MODELS[name].make(attention), name=name)
    graph = trace(source.module, source.inputs, source.axes, defaults=source.dims)
    proof = make_proof(source, graph)
    steps = load_passes([{"kind": kind, "allow_no_match": kind == "fuse_activation"} for kind in PASSES])
    return Optimized(source, graph, tuple(run_passes(graph, steps, proof=proof)))


#: Whose eager spelling, like that of others here, is left to the slow tests.
ALIKE = ("roberta", "distilbert", "qwen2")


def marks(slow: bool) -> tuple[pytest.MarkDecorator, ...]:
    return (pytest.mark.slow,) if slow else ()


every_model = pytest.mark.parametrize("name", MODELS)
both_spellings = pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name in ALIKE)) for name in MODELS])
every_spelling = pytest.mark.parametrize(
    ("name", "attention"),
    [
        pytest.param(name, attention, marks=marks(name in ALIKE and attention == "eager"))
        for name in MODELS
        for attention in SPELLINGS
    ],
)


def attentions(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op == "graphopt.attention.default"]


@every_spelling
def test_every_attention_is_fused(name: str, attention: str) -> None:
    counts = optimized(name, attention).graph.op_counts()
    assert counts["graphopt.attention.default"] == LAYERS
    assert not {op for op in counts if "softmax" in op or "scaled_dot_product" in op}


@every_spelling
def test_every_mask_is_proven(name: str, attention: str) -> None:
    found = attentions(optimized(name, attention).graph)
    for node in found:
        assert node.args["bias"] is None
        assert node.args["key_mask"] is found[0].args["key_mask"]
        assert str(node.args["key_mask"].type) == "bool[batch, sequence]"
        assert node.args["causal"] == MODELS[name].causal
        assert (node.args["window_left"], node.args["window_right"]) == (MODELS[name].window_left, -1)


@every_spelling
def test_the_key_mask_is_the_attention_mask(name: str, attention: str) -> None:
    graph = optimized(name, attention).graph
    cast = attentions(graph)[0].args["key_mask"].producer
    assert cast.op == "aten.to.dtype"
    assert cast.args["self"] is graph.inputs["attention_mask"]
    assert not {op for op in graph.op_counts() if "where" in op or "bitwise" in op or ".le." in op}


@every_spelling
def test_heads_are_last_and_grouped(name: str, attention: str) -> None:
    graph = optimized(name, attention).graph
    for node in attentions(graph):
        assert node.args["heads_last"]
        assert node.args["k"].type.shape[2] == (2 if MODELS[name].rotary else 4)
    assert "aten.transpose.int" not in graph.op_counts()


@every_spelling
def test_rotary_norms_and_activations_are_fused(name: str, attention: str) -> None:
    counts, expected = optimized(name, attention).graph.op_counts(), MODELS[name]
    found = {
        "rotary": counts.get("graphopt.rotary_embedding.default", 0),
        "rms_norm": counts.get("aten.rms_norm.default", 0),
        "add_rms_norm": counts.get("graphopt.add_rms_norm.default", 0),
        "layer_norm": counts.get("aten.layer_norm.default", 0),
        "add_layer_norm": counts.get("graphopt.add_layer_norm.default", 0),
        "gelu": counts.get("aten.gelu.default", 0),
        "gated": counts.get("graphopt.gated_activation.default", 0),
    }
    assert found == {kind: getattr(expected, kind) for kind in found}
    assert not {"aten.rsqrt.default", "aten.silu.default"} & counts.keys()


@every_spelling
def test_every_linear_is_flat(name: str, attention: str) -> None:
    graph = optimized(name, attention).graph
    linears = [node for node in graph.nodes if node.op == "aten.linear.default"]
    assert len(linears) >= 6 * LAYERS
    assert all(len(node.output.type.shape) == 2 for node in linears if "pooler" not in node.origin[0])


@every_spelling
def test_every_pass_keeps_its_contract(name: str, attention: str) -> None:
    reports = optimized(name, attention).reports
    assert [report.kind for report in reports] == list(PASSES)
    for report in reports:
        assert report.parity is not None
        assert report.parity.contract == "exact"
        assert report.parity.holds


def padded(source: Source, batch: int, sequence: int, side: str) -> dict[str, Tensor]:
    """Random tokens; row ``i`` has ``i`` positions of padding on this side, at most all but one."""
    inputs = source.sample()({"batch": batch, "sequence": sequence}, torch.Generator().manual_seed(sequence))
    padding = torch.arange(batch).clamp(max=sequence - 1)[:, None]
    positions = torch.arange(sequence)[None]
    kept = positions >= padding if side == "left" else positions < sequence - padding
    return inputs | {"attention_mask": kept.long()}


@pytest.mark.parametrize(("batch", "sequence"), [(3, 7), (5, 13), (1, 1), (2, 62)])
@pytest.mark.parametrize("side", ["left", "right"])
@every_spelling
def test_parity_with_padding_at_untraced_sizes(name: str, attention: str, side: str, batch: int, sequence: int) -> None:
    built = optimized(name, attention)
    inputs = padded(built.source, batch, sequence, side)
    expected = eager(built.source.module)(**inputs)
    got = run(built.graph, {key: tensor for key, tensor in inputs.items() if key in built.graph.inputs})
    wanted = {key: tensor for key, tensor in expected.items() if key in got}
    assert wanted.keys() == built.graph.outputs.keys()
    found = assert_parity(wanted, got, mask=inputs["attention_mask"], max_abs=2e-5)
    assert sum(parity.compared for parity in found.values()) >= batch * 32


@both_spellings
def test_both_spellings_become_the_same_graph(name: str) -> None:
    counts = [optimized(name, attention).graph.op_counts() for attention in SPELLINGS]
    assert counts[0] == counts[1]


@every_model
def test_a_padded_token_changes_nothing(name: str) -> None:
    """The mask really is applied: other tokens in its place give the same result elsewhere."""
    built = optimized(name, "sdpa")
    inputs = padded(built.source, 3, 9, "right")
    kept = inputs["attention_mask"].bool()
    given = {key: tensor for key, tensor in inputs.items() if key in built.graph.inputs}
    other = given | {"input_ids": torch.where(kept, given["input_ids"], 5)}
    assert not torch.equal(given["input_ids"], other["input_ids"])
    first, second = run(built.graph, given), run(built.graph, other)
    for key, tensor in first.items():
        if tensor.ndim == 3:
            torch.testing.assert_close(second[key][kept], tensor[kept])
