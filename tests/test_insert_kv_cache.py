"""insert_kv_cache: what it makes, that steps give what the whole sequence gives, and what it refuses."""

from __future__ import annotations

import textwrap

import pytest
import torch

import graphopt
from benchmarks.zoo.catalog import ANIMALS
from benchmarks.zoo.small import source as small_source
from graphopt.compiler import make_proof
from graphopt.errors import GraphError, PipelineError
from graphopt.execution import run
from graphopt.ir import Graph
from graphopt.passes.insert_kv_cache import InsertKvCache
from graphopt.pipeline import Context, load_passes, run_passes
from graphopt.runtime.cache import as_if_uncached, last_step, layout_of, step_lengths
from graphopt.testing import assert_parity
from graphopt.text import parse

BEFORE = """\
graph {
  dim batch in [1, 8]
  dim sequence in [1, 64]
  input %tokens: f32[batch, sequence, 8]
  input %mask: i64[batch, sequence] in {0, 1}
  weight %table: f32[64, 8]
  %place: f32[sequence, 8] = aten.slice.Tensor(self=%table, start=0, end=sequence)
  %x: f32[batch, sequence, 8] = aten.add.Tensor(self=%tokens, other=%place)
  %heads: f32[batch, sequence, 2, 4] = aten.reshape.default(self=%x, shape=[batch, sequence, 2, 4])
  %h: f32[batch, 2, sequence, 4] = aten.transpose.int(self=%heads, dim0=1, dim1=2)
  %real: bool[batch, sequence] = aten.to.dtype(self=%mask, dtype=bool)
  %a: f32[batch, 2, sequence, 4] = graphopt.attention.default(q=%h, k=%h, v=%h, key_mask=%real, scale=1.0, causal="upper_left")
  %b: f32[batch, sequence, 2, 4] = aten.transpose.int(self=%a, dim0=1, dim1=2)
  output y = %b
}
"""


AFTER = """\
graph {
  dim batch in [1, 8]
  dim sequence in [1, 64]
  dim past in [0, 63]
  input %tokens: f32[batch, sequence, 8]
  input %mask: i64[batch, past + sequence] in {0, 1}
  input %past_key_values.0.key: f32[batch, 2, past, 4]
  input %past_key_values.0.value: f32[batch, 2, past, 4]
  weight %table: f32[64, 8]
  %cumsum: i64[batch, past + sequence] = aten.cumsum.default(self=%mask, dim=1)
  %slice: i64[batch, sequence] = aten.slice.Tensor(self=%cumsum, dim=1, start=past, end=past + sequence)
  %sub: i64[batch, sequence] = aten.sub.Tensor(self=%slice, other=1)
  %clamp: i64[batch, sequence] = aten.clamp.default(self=%sub, min=0)
  %index: f32[batch, sequence, 8] = aten.index.Tensor(self=%table, indices=[%clamp])
  %to: bool[batch, past + sequence] = aten.to.dtype(self=%mask, dtype=bool)
  %x: f32[batch, sequence, 8] = aten.add.Tensor(self=%tokens, other=%index)
  %heads: f32[batch, sequence, 2, 4] = aten.reshape.default(self=%x, shape=[batch, sequence, 2, 4])
  %h: f32[batch, 2, sequence, 4] = aten.transpose.int(self=%heads, dim0=1, dim1=2)
  %cat: f32[batch, 2, past + sequence, 4] = aten.cat.default(tensors=[%past_key_values.0.key, %h], dim=2)
  %cat_1: f32[batch, 2, past + sequence, 4] = aten.cat.default(tensors=[%past_key_values.0.value, %h], dim=2)
  %a: f32[batch, 2, sequence, 4] = graphopt.attention.default(q=%h, k=%cat, v=%cat_1, key_mask=%to, scale=1.0, LOWER)
  %b: f32[batch, sequence, 2, 4] = aten.transpose.int(self=%a, dim0=1, dim1=2)
  output y = %b
  output present.0.key = %cat
  output present.0.value = %cat_1
}
""".replace("LOWER", 'causal="lower_right"')


def inserted(text: str) -> Graph:
    graph = parse(text)
    InsertKvCache().run(graph, Context())
    graph.verify()
    return graph


def test_what_it_makes() -> None:
    assert inserted(BEFORE).text() == AFTER


@pytest.mark.parametrize(("batch", "sequence"), [(1, 1), (2, 5), (3, 16)])
def test_steps_give_what_the_whole_gives(batch: int, sequence: int) -> None:
    weights = {"table": torch.randn(64, 8)}
    inputs = {"tokens": torch.randn(batch, sequence, 8), "mask": torch.ones(batch, sequence, dtype=torch.int64)}
    inputs["mask"][-1, sequence - sequence // 2 :] = 0
    whole = run(parse(BEFORE, weights=weights), inputs)
    graph = parse(BEFORE, weights=weights)
    InsertKvCache().run(graph, Context())
    layout = layout_of(graph)
    assert layout is not None
    steps = as_if_uncached(lambda feeds: run(graph, feeds), layout, inputs, inputs["mask"])
    real = inputs["mask"].bool()
    torch.testing.assert_close(steps.outputs["y"][real], whole["y"][real])


#: One for each way to say positions and masks: rotary, learned, by the mask's sum, ALiBi, windows, chunks, sinks, experts.
DECODERS = (
    "LlamaForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM", "BloomForCausalLM", "MptForCausalLM", "FalconForCausalLM",
    "GPTJForCausalLM", "Gemma3ForCausalLM", "Llama4ForCausalLM", "GptOssForCausalLM", "MixtralForCausalLM",
    "DeepseekV2ForCausalLM", "OpenAIGPTLMHeadModel", "XGLMForCausalLM", "GPTNeoForCausalLM", "GPTBigCodeForCausalLM",
)  # fmt: skip


@pytest.mark.parametrize(
    "options", [{"layout": "growing"}, {"layout": "static", "max_length": 40}], ids=lambda o: o["layout"]
)
@pytest.mark.parametrize("name", DECODERS)
def test_an_architecture_decodes_as_eager(name: str, options: dict[str, object]) -> None:
    animal = next(animal for animal in ANIMALS if animal.name == name)
    source = small_source(animal, "eager")
    graph = graphopt.trace(source.module, source.inputs, source.axes, defaults=source.dims, truths=source.truths)
    proof = make_proof(source, graph)
    kinds = ("decompose_complex", "canonicalize", "fuse_attention")
    steps = [*({"kind": kind, "allow_no_match": True} for kind in kinds), {"kind": "insert_kv_cache", **options}]
    reports = run_passes(graph, load_passes(steps), proof=proof)
    assert reports[-1].matches == {"attention": 2}
    layout = layout_of(graph)
    assert layout is not None
    assert len(layout.names) == 4
    assert proof.compact is not None
    texts = proof.compact()
    for probe, expected in zip(texts.probes, texts.references, strict=True):
        got = as_if_uncached(lambda feeds: run(graph, feeds), layout, probe.inputs, probe.mask)
        assert_parity({name: expected[name] for name in got.outputs}, dict(got.outputs), mask=got.seen, relative=1e-4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (('causal="upper_left"', 'causal="none"'), "it is not proven to be causal"),
        (("k=%h, v=%h", "k=%place4, v=%place4"), "its keys do not come from the tokens"),
        (("key_mask=%real", "bias=%scores"), "its bias depends on the tokens"),
        (("dim sequence", "dim past in [1, 2]\n  dim sequence"), "there is a size named past already"),
    ],
)
def test_refusals(change: tuple[str, str], reason: str) -> None:
    extra = textwrap.dedent("""\
      %place4: f32[batch, 2, sequence, 4] = aten.full.default(size=[batch, 2, sequence, 4], fill_value=1.0, dtype=f32)
      %turned: f32[batch, 2, 4, sequence] = aten.transpose.int(self=%h, dim0=2, dim1=3)
      %scores: f32[batch, 2, sequence, sequence] = aten.matmul.default(self=%h, other=%turned)
    """)
    text = BEFORE.replace("  %a:", textwrap.indent(extra, "  ") + "  %a:").replace(*change)
    with pytest.raises(GraphError, match=reason):
        InsertKvCache().run(parse(text), Context())


def test_heads_must_not_be_last_yet() -> None:
    text = BEFORE.replace("q=%h, k=%h, v=%h,", "q=%heads, k=%heads, v=%heads,").replace(
        'causal="upper_left"', 'causal="upper_left", heads_last=True'
    )
    text = text.replace("%a: f32[batch, 2, sequence, 4]", "%a: f32[batch, sequence, 2, 4]")
    text = text.replace("%b: f32[batch, sequence, 2, 4]", "%b: f32[batch, 2, sequence, 4]")
    with pytest.raises(GraphError, match="its heads are last"):
        InsertKvCache().run(parse(text), Context())


def test_an_encoder_is_refused() -> None:
    with pytest.raises(PipelineError, match="insert_kv_cache"):
        load_passes([{"kind": "canonicalize"}, {"kind": "insert_kv_cache"}])


def test_a_graph_without_attention_is_refused() -> None:
    text = "graph {\n  dim s in [1, 8]\n  input %x: f32[s]\n  output y = %x\n}\n"
    with pytest.raises(GraphError, match="there is no attention that could keep its keys"):
        InsertKvCache().run(parse(text), Context())


def test_the_steps_try_everything() -> None:
    assert step_lengths(1) == [1, 0, 0, 0]
    assert step_lengths(2) == [1, 0, 1, 0]
    assert step_lengths(7) == [4, 1, 1, 1]
    assert step_lengths(20) == [10, 8, 1, 1]


def test_the_last_step_has_a_past() -> None:
    graph = inserted(BEFORE)
    graph = parse(graph.text(), weights={"table": torch.randn(64, 8)})
    layout = layout_of(graph)
    assert layout is not None
    inputs = {"tokens": torch.randn(2, 6, 8), "mask": torch.ones(2, 6, dtype=torch.int64)}
    feeds = last_step(lambda given: run(graph, given), layout, inputs, inputs["mask"])
    assert feeds["tokens"].shape == (2, 1, 8)
    assert feeds["mask"].shape == (2, 6)
    assert feeds["past_key_values.0.key"].shape == (2, 2, 5, 4)
