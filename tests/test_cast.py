"""cast: products in half precision, what loses by it in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import graphopt
from graphopt.errors import NoMatchError, PassError
from graphopt.execution import run
from graphopt.ir import Graph
from graphopt.passes.cast import Cast
from graphopt.pipeline import Context, load_passes, run_passes
from graphopt.sources import Source
from tests.rules import apply_pass, program, read
from tests.tiny import tiny_bert, tiny_llama

HEAD = """
    dim batch in [1, ...]
    dim sequence in [1, ...]
    input %x: f32[batch, sequence, 8]
"""
BEFORE = f"""{HEAD}
    weight %a.weight: f32[8, 8]
    weight %n.weight: f32[8]
    %h: f32[batch, sequence, 8] = aten.linear.default(input=%x, weight=%a.weight)
    %n: f32[batch, sequence, 8] = aten.rms_norm.default(input=%h, normalized_shape=[8], weight=%n.weight)
    %y: f32[batch, sequence, 8] = aten.linear.default(input=%n, weight=%a.weight)
    output y = %y
"""
AFTER = f"""{HEAD}
    weight %n.weight: f32[8]
    weight %a.weight.f16: f16[8, 8]
    %to: f16[batch, sequence, 8] = aten.to.dtype(self=%x, dtype=f16)
    %h: f16[batch, sequence, 8] = aten.linear.default(input=%to, weight=%a.weight.f16)
    %to_1: f32[batch, sequence, 8] = aten.to.dtype(self=%h, dtype=f32)
    %n: f32[batch, sequence, 8] = aten.rms_norm.default(input=%to_1, normalized_shape=[8], weight=%n.weight)
    %to_2: f16[batch, sequence, 8] = aten.to.dtype(self=%n, dtype=f16)
    %y: f16[batch, sequence, 8] = aten.linear.default(input=%to_2, weight=%a.weight.f16)
    %to_3: f32[batch, sequence, 8] = aten.to.dtype(self=%y, dtype=f32)
    output y = %to_3
"""
KINDS = ("canonicalize", "fuse_attention", "fuse_norm", "fuse_activation")
FUSED: list[dict[str, Any]] = [{"kind": kind, "allow_no_match": True} for kind in KINDS]


def cast(**options: Any) -> Cast:
    (step,) = load_passes([{"kind": "canonicalize"}, {"kind": "cast", **options}])[1:]
    assert isinstance(step, Cast)
    return step


def cast_graph(body: str, **options: Any) -> tuple[Graph, Context]:
    graph, context = read(body), Context()
    run_passes(graph, [cast(**options)], context=context)
    return graph, context


def test_fires() -> None:
    assert apply_pass(BEFORE, cast(), Context()).text == program(AFTER)


def test_bfloat_has_its_own_name() -> None:
    assert apply_pass(BEFORE, cast(dtype="bf16"), Context()).text == program(AFTER.replace("f16", "bf16"))


@pytest.mark.parametrize(("dtype", "limit"), [("fp16", 2e-3), ("bf16", 2e-2)])
@pytest.mark.parametrize("sizes", [(2, 6), (3, 1)])
def test_near_the_graph_before(dtype: str, limit: float, sizes: tuple[int, int]) -> None:
    graph, _ = cast_graph(BEFORE, dtype=dtype)
    inputs = {"x": torch.randn(*sizes, 8, generator=torch.Generator().manual_seed(0))}
    got, expected = run(graph, inputs)["y"], run(read(BEFORE), inputs)["y"]
    assert got.dtype == torch.float32
    assert 0 < float((got - expected).abs().max()) <= limit * float(expected.abs().max())


def test_a_value_is_cast_once_for_all_that_read_it() -> None:
    twice = BEFORE.replace(
        "output y = %y", "%z = aten.linear.default(input=%x, weight=%a.weight)\noutput z = %z\noutput y = %y"
    )
    graph, _ = cast_graph(twice)
    assert sum(node.op == "aten.to.dtype" and node.args["self"].name == "x" for node in graph.nodes) == 1


def test_layers_that_are_kept_are_reported() -> None:
    graph, context = read(BEFORE), Context()
    for node in graph.nodes:
        node.origin = ("first" if node.output.name == "h" else "second",)
    run_passes(graph, [cast(keep=("first",))], context=context)
    assert [(layer.precision, layer.reason) for layer in context.layers] == [("fp32", "kept"), ("fp16", None)]


def test_a_pattern_that_nothing_matches_is_refused() -> None:
    with pytest.raises(PassError, match="no module matches 'thrid'"):
        cast_graph(BEFORE, keep=("thrid",))


def test_a_graph_without_products_is_refused() -> None:
    with pytest.raises(NoMatchError, match="cast changed nothing"):
        cast_graph(f"{HEAD}%y = aten.exp.default(self=%x)\noutput y = %y")


def test_numbers_that_do_not_fit_stay_in_fp32() -> None:
    body = BEFORE.replace("output y = %y", "%c = aten.clamp.default(self=%y, min=-1000000000.0, max=1000000000.0)\noutput y = %c")
    graph, _ = cast_graph(body)
    assert graph.value("c").type.dtype == torch.float32


def test_the_lowest_number_of_a_mask_stays_finite() -> None:
    """A row that sees nothing is the mean of all, as before, not NaN."""
    body = """
        dim batch in [1, ...]
        dim sequence in [1, ...]
        input %q: f32[batch, 2, sequence, 8]
        input %seen: bool[batch, 1, 1, sequence]
        weight %zero: f32[]
        weight %low: f32[]
        %bias = aten.where.self(condition=%seen, self=%zero, other=%low)
        %y = graphopt.attention.default(q=%q, k=%q, v=%q, bias=%bias, scale=0.25)
        output y = %y
    """
    graph = read(body)
    graph.weights["low"].load().fill_(torch.finfo(torch.float32).min)
    graph.weights["zero"].load().zero_()
    whole = graph.clone()
    run_passes(graph, [cast()], context=Context())
    inputs = {"q": torch.randn(1, 2, 4, 8), "seen": torch.zeros(1, 1, 1, 4, dtype=torch.bool)}
    got, expected = run(graph, inputs)["y"], run(whole, inputs)["y"]
    assert not bool(got.isnan().any())
    torch.testing.assert_close(got, expected, atol=5e-3, rtol=0)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("make", [tiny_bert, tiny_llama])
def test_models_keep_their_budget(make: Any, dtype: str, tmp_path: Path) -> None:
    """On probes with padding, at sizes that were not traced."""
    source: Source = make()
    step = {"kind": "cast", "dtype": dtype, "budget": {"metric": "cosine", "limit": 0.999}}
    made = graphopt.compile(source, tmp_path / "e", passes=[*FUSED, step], target={"backend": "torch"})
    report = made.manifest.report.passes[-1]
    assert report.parity is not None
    assert report.parity.holds
    assert report.bytes_after < 0.6 * report.bytes_before


@pytest.mark.parametrize("make", [tiny_bert, tiny_llama])
def test_onnxruntime_computes_halves(make: Any, tmp_path: Path) -> None:
    target = {"backend": "onnxruntime", "tactics": "fixed", "threads": 1}
    made = graphopt.compile(make(), tmp_path / "e", passes=[*FUSED, {"kind": "cast"}], target=target)
    assert made.manifest.report.engine is not None
    assert made.manifest.report.engine.holds


def test_angles_of_far_positions_stay_in_fp32() -> None:
    graph = read("""
        dim sequence in [1, ...]
        input %ids: i64[sequence]
        weight %table: f32[9000, 8]
        weight %frequencies: f32[4]
        %p = aten.to.dtype(self=%ids, dtype=f32)
        %u = aten.unsqueeze.default(self=%p, dim=1)
        %angles = aten.mul.Tensor(self=%u, other=%frequencies)
        %cos = aten.cos.default(self=%angles)
        %e = aten.embedding.default(weight=%table, indices=%ids)
        %h = aten.slice.Tensor(self=%e, dim=1, start=0, end=4)
        %y = aten.mul.Tensor(self=%h, other=%cos)
        output y = %y
    """)
    whole = graph.clone()
    run_passes(graph, [cast()], context=Context())
    assert [graph.value(name).type.dtype for name in ("angles", "e", "y")] == [
        torch.float32,
        torch.float16,
        torch.float16,
    ]
    inputs = {"ids": torch.tensor([8191, 5001, 3])}
    got, expected = run(graph, inputs)["y"], run(whole, inputs)["y"]
    torch.testing.assert_close(got, expected, atol=3e-3 * float(expected.abs().max()), rtol=0)


def test_quantized_after_it(tmp_path: Path) -> None:
    source = tiny_bert()
    ids = torch.randint(0, 99, (4, 6), generator=torch.Generator().manual_seed(0))
    data = [{name: torch.ones_like(ids) if "mask" in name else ids * (name == "input_ids") for name in source.tensors}]
    steps = [
        {"kind": "cast"},
        {"kind": "quantize", "scheme": "int8_static", "calibration": {"data": data}, "skip": ["pooler*"]},
    ]
    target = {"backend": "onnxruntime", "tactics": "fixed", "threads": 1}
    made = graphopt.compile(source, tmp_path / "e", passes=[*FUSED, *steps], target=target)
    layers = made.manifest.report.passes[-1].layers
    assert {layer.precision for layer in layers if layer.reason == "skipped"} == {"fp16"}
