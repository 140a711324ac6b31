"""insert_kv_cache: what it makes, that steps give what the whole sequence gives, and what it refuses."""

from __future__ import annotations

import contextlib
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import graphopt
from benchmarks.zoo.catalog import ANIMALS
from benchmarks.zoo.small import source as small_source
from graphopt import attentions
from graphopt.compiler import make_proof
from graphopt.dims import Dim
from graphopt.errors import GraphError, LoweringError, PipelineError
from graphopt.execution import run
from graphopt.ir import Graph
from graphopt.passes.insert_kv_cache import InsertKvCache
from graphopt.pipeline import Context, load_passes, run_passes
from graphopt.runtime.cache import as_if_uncached, last_step, layout_of, step_lengths
from graphopt.schemas.report import BuildReport
from graphopt.sources import Source
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


# The static layout


AFTER_STATIC = """\
graph {
  dim batch in [1, 8]
  dim sequence in [1, 16]
  input %tokens: f32[batch, sequence, 8]
  input %past_lengths: i64[batch]
  input %past_key_values.0.key: f32[batch, 2, 16, 4]
  input %past_key_values.0.value: f32[batch, 2, 16, 4]
  weight %table: f32[64, 8]
  %arange: i64[sequence] = aten.arange.start_step(start=0, end=sequence, dtype=i64)
  %unsqueeze: i64[batch, 1] = aten.unsqueeze.default(self=%past_lengths, dim=1)
  %add: i64[batch, sequence] = aten.add.Tensor(self=%unsqueeze, other=%arange)
  %index: f32[batch, sequence, 8] = aten.index.Tensor(self=%table, indices=[%add])
  %x: f32[batch, sequence, 8] = aten.add.Tensor(self=%tokens, other=%index)
  %heads: f32[batch, sequence, 2, 4] = aten.reshape.default(self=%x, shape=[batch, sequence, 2, 4])
  %h: f32[batch, 2, sequence, 4] = aten.transpose.int(self=%heads, dim0=1, dim1=2)
  %kv_cache_update: f32[batch, 2, 16, 4] = graphopt.kv_cache_update.default(cache=%past_key_values.0.key, new=%h, STARTS)
  %kv_cache_update_1: f32[batch, 2, 16, 4] = graphopt.kv_cache_update.default(cache=%past_key_values.0.value, new=%h, STARTS)
  %a: f32[batch, 2, sequence, 4] = graphopt.attention.default(q=%h, k=%kv_cache_update, v=%kv_cache_update_1, STARTS, LAST)
  %b: f32[batch, sequence, 2, 4] = aten.transpose.int(self=%a, dim0=1, dim1=2)
  output y = %b
  output present.0.key = %kv_cache_update
  output present.0.value = %kv_cache_update_1
}
""".replace("STARTS", "starts=%past_lengths").replace("LAST", 'scale=1.0, causal="upper_left"')


def static(text: str, max_length: int = 16) -> Graph:
    graph = parse(text, {"table": torch.randn(64, 8)})
    InsertKvCache(layout="static", max_length=max_length).run(graph, Context())
    graph.verify()
    return graph


def test_what_the_static_layout_makes() -> None:
    assert static(BEFORE).text() == AFTER_STATIC


@pytest.mark.parametrize(("batch", "sequence", "max_length"), [(1, 1, 1), (2, 5, 5), (3, 16, 16), (3, 9, 64)])
def test_static_steps_give_what_the_whole_gives(batch: int, sequence: int, max_length: int) -> None:
    """Up to the last place of the buffers, one row shorter than the others."""
    weights = {"table": torch.randn(64, 8)}
    inputs = {"tokens": torch.randn(batch, sequence, 8), "mask": torch.ones(batch, sequence, dtype=torch.int64)}
    inputs["mask"][-1, sequence - sequence // 2 :] = 0
    whole = run(parse(BEFORE, weights=weights), inputs)
    graph = parse(BEFORE, weights=weights)
    InsertKvCache(layout="static", max_length=max_length).run(graph, Context())
    layout = layout_of(graph)
    assert layout is not None
    assert layout.max_length == max_length
    steps = as_if_uncached(lambda feeds: run(graph, feeds), layout, inputs, inputs["mask"])
    real = inputs["mask"].bool()
    torch.testing.assert_close(steps.outputs["y"][real], whole["y"][real])


@pytest.mark.parametrize("padding", [1, 3])
def test_padding_in_front_of_the_growing_layout(padding: int) -> None:
    """A row with padding in front gives what it gives alone: its positions count from its first token."""
    weights = {"table": torch.randn(64, 8)}
    graph = parse(BEFORE, weights=weights)
    InsertKvCache().run(graph, Context())
    tokens, mask = torch.randn(2, 7, 8), torch.ones(2, 7, dtype=torch.int64)
    mask[1, :padding] = 0
    cache = {name: torch.zeros(2, 2, 0, 4) for name in ("past_key_values.0.key", "past_key_values.0.value")}
    found = []
    for first, last in ((0, 4), (4, 6), (6, 7)):
        results = run(graph, {"tokens": tokens[:, first:last], "mask": mask[:, :last], **cache})
        found.append(results["y"])
        cache = {name: results[name.replace("past_key_values", "present")] for name in cache}
    alone = {"tokens": tokens[1:, padding:], "mask": mask[1:, padding:]}
    torch.testing.assert_close(torch.cat(found, 1)[1:, padding:], run(parse(BEFORE, weights=weights), alone)["y"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"layout": "static"}, "layout: static needs max_length"),
        ({"layout": "growing", "max_length": 8}, "max_length is for layout: static"),
        ({"max_length": 8}, "max_length is for layout: static"),
        ({"layout": "static", "max_length": 0}, "greater than 0"),
        ({"layout": "paged"}, "'growing' or 'static'"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, object], reason: str) -> None:
    kinds = ({"kind": "canonicalize"}, {"kind": "fuse_attention"})
    with pytest.raises(PipelineError, match=reason):
        load_passes([*kinds, {"kind": "insert_kv_cache", **options}])


WITHOUT_MASK = "".join(line for line in BEFORE.splitlines(True) if "%mask" not in line).replace("key_mask=%real, ", "")


def test_a_model_without_a_mask() -> None:
    """Positions are those of the columns; the static layout is the same as with one."""
    text = inserted(WITHOUT_MASK).text()
    assert "cumsum" not in text
    assert "%place: " not in text
    assert static(WITHOUT_MASK).text() == AFTER_STATIC


@pytest.mark.parametrize("max_length", [64, 65])
def test_a_cache_as_long_as_the_model(max_length: int) -> None:
    if max_length == 64:
        assert static(WITHOUT_MASK, max_length).dims["sequence"].max == 64
        return
    with pytest.raises(GraphError, match="a cache of 65 positions is longer than the model's 64"):
        static(WITHOUT_MASK, max_length)


def test_a_cache_longer_than_a_model_with_a_mask() -> None:
    with pytest.raises(GraphError, match="a cache of 65 positions is longer than the model's 64"):
        static(BEFORE, 65)


HIDING = """\
  %count: i64[sequence] = aten.arange.start_step(start=0, end=sequence, dtype=i64)
  %odd: i64[sequence] = aten.remainder.Scalar(self=%count, other=2)
  %some: bool[sequence] = aten.ne.Scalar(self=%odd, other=1)
  %given: bool[batch, sequence] = aten.to.dtype(self=%mask, dtype=bool)
  %real: bool[batch, sequence] = aten.bitwise_and.Tensor(self=%given, other=%some)
"""
REAL = "  %real: bool[batch, sequence] = aten.to.dtype(self=%mask, dtype=bool)\n"


def test_a_mask_that_hides_keys() -> None:
    """Every other key: the growing layout computes it for all positions, the static one has no mask to say it."""
    text = BEFORE.replace(REAL, HIDING)
    assert inserted(text)
    with pytest.raises(GraphError, match="%real hides keys where there is no padding"):
        static(text)


def with_argument(name: str, lines: str) -> str:
    """The attention with one more argument, made by these lines."""
    return BEFORE.replace("  %a:", lines + "  %a:").replace("key_mask=%real,", f"key_mask=%real, {name},")


LENGTHS = "  %lengths: i64[batch] = aten.sum.dim_IntList(self=%mask, dim=[1])\n"


@pytest.mark.parametrize(
    ("argument", "lines", "reason"),
    [
        ("prefix=%real", "", "its prefix belong to a whole text"),
        ("kv_lengths=%lengths", LENGTHS, "its kv_lengths belong to a whole text"),
        ("segments=%mask2", "  %mask2: i64[batch, sequence] = aten.cumsum.default(self=%mask, dim=1)\n", ""),
        (
            "segments=%square",
            "  %n: i64[batch, sequence] = aten.cumsum.default(self=%mask, dim=1)\n"
            "  %nn: i64[batch, sequence] = aten.mul.Tensor(self=%n, other=%n)\n"
            "  %square: i64[batch, sequence] = aten.floor_divide.default(self=%nn, other=9)\n",
            "its segments are no chunks of one length",
        ),
    ],
)
def test_what_the_static_layout_refuses(argument: str, lines: str, reason: str) -> None:
    text = with_argument(argument, lines)
    if not reason:
        assert "chunk=1" in static(text).text()
        return
    with pytest.raises(GraphError, match=reason):
        static(text)


def halves(dtype: str, counted: str) -> str:
    """Segments of 32 positions each, as numbers of a type, of positions that are counted by these lines."""
    return with_argument(
        "segments=%part",
        f"{counted}  %half: i64[batch, sequence] = aten.floor_divide.default(self=%n, other=32)\n"
        f"  %part: {dtype}[batch, sequence] = aten.to.dtype(self=%half, dtype={dtype})\n",
    )


ALONG_MASK = """\
  %real_ones: i64[batch, sequence] = aten.cumsum.default(self=%mask, dim=1)
  %n: i64[batch, sequence] = aten.sub.Tensor(self=%real_ones, other=1)
"""
ALONG_COLUMNS = """\
  %count: i64[sequence] = aten.arange.start_step(start=0, end=sequence, dtype=i64)
  %row: i64[1, sequence] = aten.unsqueeze.default(self=%count, dim=0)
  %n: i64[batch, sequence] = aten.expand.default(self=%row, size=[batch, sequence])
"""
SIZELESS = pytest.mark.xfail(strict=True, reason="KeyError: without an input nothing says how long the sequence is")


@pytest.mark.parametrize(
    ("dtype", "counted"),
    [
        ("i64", ALONG_MASK),
        ("i32", ALONG_MASK),
        ("f32", ALONG_MASK),
        ("bool", ALONG_MASK),
        pytest.param("i64", ALONG_COLUMNS, marks=SIZELESS),
    ],
)
def test_segments_that_are_chunks(dtype: str, counted: str) -> None:
    """Two halves of 32 positions: to be refused, or chunks."""
    with contextlib.suppress(GraphError):
        assert "chunk=32" in static(halves(dtype, counted), 64).text()


def test_lengths_in_the_growing_layout() -> None:
    """They are counted along the mask of all positions."""
    graph = inserted(with_argument("kv_lengths=%lengths", LENGTHS))
    lengths = next(node for node in graph.nodes if node.op == attentions.FUSED).args["kv_lengths"]
    assert lengths.producer is not None
    assert graph.inputs["mask"].type.shape[1] == Dim.parse("past + sequence")


@pytest.mark.xfail(strict=True, reason="an axis as long as a batch of a fixed size is taken for the batch")
def test_a_fixed_batch_of_as_many_rows_as_heads() -> None:
    """A bias of heads by queries by keys, at a batch of two and two heads."""
    text = WITHOUT_MASK.replace("batch", "2").replace("  dim 2 in [1, 8]\n", "")
    text = (
        text.replace("q=%h, k=%h, v=%h,", "q=%h, k=%h, v=%h, bias=%bias,")
        .replace(
            "  %a:",
            "  %n: i64[sequence] = aten.arange.start_step(start=0, end=sequence, dtype=i64)\n"
            "  %f: f32[sequence] = aten.to.dtype(self=%n, dtype=f32)\n"
            "  %column: f32[sequence, 1] = aten.unsqueeze.default(self=%f, dim=1)\n"
            "  %far: f32[sequence, sequence] = aten.sub.Tensor(self=%column, other=%f)\n"
            "  %square: f32[sequence, sequence] = aten.mul.Tensor(self=%far, other=%far)\n"
            "  %bias: f32[2, sequence, sequence] = aten.mul.Tensor(self=%square, other=%slopes)\n"
            "  %a:",
        )
        .replace("  weight", "  weight %slopes: f32[2, 1, 1]\n  weight", 1)
    )
    weights = {"table": torch.randn(64, 8), "slopes": torch.randn(2, 1, 1)}
    inputs = {"tokens": torch.randn(2, 9, 8)}
    mask = (torch.arange(9) < torch.tensor([[9], [4]])).long()
    whole = run(parse(text, weights), inputs)
    graph = parse(text, weights)
    InsertKvCache(layout="static", max_length=16).run(graph, Context())
    layout = layout_of(graph)
    assert layout is not None
    steps = as_if_uncached(lambda feeds: run(graph, feeds), layout, inputs, mask)
    torch.testing.assert_close(steps.outputs["y"][mask.bool()], whole["y"][mask.bool()])


@pytest.mark.parametrize("options", [{}, {"layout": "static", "max_length": 16}])
def test_tokens_that_mix_are_refused(options: dict[str, object]) -> None:
    """A sum over tokens besides attention needs a past of its own."""

    class Mixing(torch.nn.Module):
        def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
            heads = (tokens + tokens.cumsum(1)).reshape(*tokens.shape[:2], 2, 4).transpose(1, 2)
            return {
                "y": torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True).transpose(
                    1, 2
                )
            }

    source = Source(Mixing().eval(), {"tokens": torch.randn(2, 6, 8)}, {"tokens": ("batch", "sequence", None)})
    passes: list[dict[str, Any]] = [
        {"kind": "canonicalize", "allow_no_match": True},
        {"kind": "fuse_attention"},
        {"kind": "insert_kv_cache", **options},
    ]
    graph = graphopt.trace(source.module, source.inputs, source.axes)
    with pytest.raises(GraphError, match=r"aten\.cumsum\.default goes along the tokens"):
        run_passes(graph, load_passes(passes), proof=make_proof(source, graph))


# Engines

ENGINES = ("LlamaForCausalLM", "GPT2LMHeadModel", "MptForCausalLM", "GptOssForCausalLM")
ENGINE_OPTIONS: dict[str, tuple[dict[str, object], ...]] = {
    "growing": ({"kind": "insert_kv_cache"},),
    "static": ({"kind": "insert_kv_cache", "layout": "static", "max_length": 40},),
}


def compiled(
    name: str, steps: tuple[dict[str, object], ...], folder: Path, dims: dict[str, tuple[int, int | None]] | None = None
) -> BuildReport:
    source = small_source(next(animal for animal in ANIMALS if animal.name == name), "eager")
    kinds = ("decompose_complex", "canonicalize", "fuse_attention")
    passes = [*({"kind": kind, "allow_no_match": True} for kind in kinds), *steps]
    target = {"backend": "onnxruntime", "tactics": "fixed"}
    return graphopt.compile(source, folder / "engine", passes=passes, target=target, dims=dims).report


@pytest.mark.parametrize("layout", ENGINE_OPTIONS)
@pytest.mark.parametrize("name", ENGINES)
def test_engines(name: str, layout: str, tmp_path: Path) -> None:
    report = compiled(name, ENGINE_OPTIONS[layout], tmp_path)
    assert report.engine is not None
    assert report.engine.holds
    assert ("TensorScatter" in report.engine_ops) == (layout == "static")


FUSED: tuple[dict[str, object], ...] = (*ENGINE_OPTIONS["static"], {"kind": "fuse_cached_attention"})


@pytest.mark.parametrize("name", ["GptOssForCausalLM"])
def test_engines_with_one_kernel(name: str, tmp_path: Path) -> None:
    report = compiled(name, FUSED, tmp_path)
    assert report.engine_ops["GroupQueryAttention"] == 2
    assert "TensorScatter" not in report.engine_ops


@pytest.mark.parametrize("name", ["BloomForCausalLM", "MptForCausalLM"])
def test_what_the_kernel_has_not(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ALiBi as a bias of keys or of few axes."""
    animal = next(animal for animal in ANIMALS if animal.name == name)
    monkeypatch.setitem(animal.changes, "d_model" if name.startswith("Mpt") else "hidden_size", 64)
    with contextlib.suppress(LoweringError):
        compiled(name, FUSED, tmp_path)


@pytest.mark.parametrize("layout", ENGINE_OPTIONS)
def test_a_model_of_at_least_two_tokens(layout: str, tmp_path: Path) -> None:
    """``dims: {sequence: [2, 64]}``: a decoder takes single tokens all the same."""
    compiled("LlamaForCausalLM", ENGINE_OPTIONS[layout], tmp_path, {"sequence": (2, 64)})


@pytest.mark.xfail(strict=True, reason="the probes' texts are longer than the cache")
@pytest.mark.parametrize("max_length", [1, 8])
def test_short_buffers(max_length: int, tmp_path: Path) -> None:
    compiled("LlamaForCausalLM", ({"kind": "insert_kv_cache", "layout": "static", "max_length": max_length},), tmp_path)
