"""cast: products in half precision, what loses by it in fp32."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, rotate_half

import graphopt
from graphopt.compiler import make_proof
from graphopt.errors import NoMatchError, PassError
from graphopt.execution import run
from graphopt.ir import DimRange, Graph, Weight
from graphopt.passes.cast import Cast
from graphopt.pipeline import Context, Proof, load_passes, run_passes
from graphopt.schemas.report import PassReport
from graphopt.sources import Source
from tests.rules import apply_pass, assert_idempotent, difference, program, read
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
    body = BEFORE.replace(
        "output y = %y", "%c = aten.clamp.default(self=%y, min=-1000000000.0, max=1000000000.0)\noutput y = %c"
    )
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


class Patches(nn.Module):
    """An image model: patches by a convolution, one block of attention, the mean of its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 4, stride=4)
        self.before, self.after = nn.LayerNorm(32), nn.LayerNorm(32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.before(x)).unflatten(2, (3, 4, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        result: Tensor = (x + self.mlp(self.after(x))).mean(1)
        return result


def patches() -> Source:
    torch.manual_seed(0)
    return Source(Patches().eval(), {"pixels": torch.randn(2, 3, 16, 16)}, {"pixels": ("batch", None, None, None)})


CACHE: list[dict[str, Any]] = [
    {"kind": "insert_kv_cache", "layout": "static", "max_length": 48, "logits": "last"},
    {"kind": "fuse_cached_attention"},
]
MODELS = {
    "bert": (tiny_bert, FUSED),
    "llama": (tiny_llama, FUSED),
    "cached llama": (tiny_llama, FUSED + CACHE),
    "eager llama": (lambda: tiny_llama("eager"), FUSED[:1]),
    "patches": (patches, FUSED),
}


@functools.cache
def prepared(name: str) -> tuple[Graph, Proof]:
    """A model's graph before the cast, with probes: padding, two sizes, the first of them not the traced one."""
    make, steps = MODELS[name]
    source: Source = make()
    dims = {"batch": DimRange(1, 2)} if name == "cached llama" else {}
    graph = graphopt.trace(source.module, source.inputs, source.axes, dims, source.dims, source.truths)
    proof = make_proof(source, graph)
    run_passes(graph, load_passes(steps), context=Context(source=source))
    return graph, proof


def cast_model(name: str, **options: Any) -> tuple[Graph, PassReport]:
    before, proof = prepared(name)
    graph = before.clone()
    (report,) = run_passes(graph, [cast(**options)], context=Context(), proof=proof)
    return graph, report


@pytest.mark.parametrize(("dtype", "limit"), [("fp16", 0.999), ("bf16", 0.99)])
@pytest.mark.parametrize("name", MODELS)
def test_models_stay_near_eager(name: str, dtype: str, limit: float) -> None:
    """On probes with padding, at sizes that were not traced."""
    before, proof = prepared(name)
    graph, report = cast_model(name, dtype=dtype, budget={"metric": "cosine", "limit": limit})
    assert report.parity is not None
    assert report.parity.holds
    assert len({tuple(probe.sizes.items()) for probe in proof.first(2).probes}) == 2
    assert report.bytes_after < 0.6 * report.bytes_before
    assert {n: v.type for n, v in graph.inputs.items()} == {n: v.type for n, v in before.inputs.items()}
    assert {n: v.type for n, v in graph.outputs.items()} == {n: v.type for n, v in before.outputs.items()}


@pytest.mark.parametrize("name", ["bert", "eager llama"])
def test_padding_sees_no_nan(name: str) -> None:
    """The rows of padding too, which no parity looks at."""
    graph, _ = cast_model(name)
    for probe in prepared(name)[1].probes:
        assert all(bool(tensor.isfinite().all()) for tensor in run(graph, probe.inputs).values())


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_torch_engine_is_the_interpreter(dtype: str, tmp_path: Path) -> None:
    made = graphopt.compile(patches(), tmp_path / "e", passes=[*FUSED, {"kind": "cast", "dtype": dtype, "budget": LOOSE}],
        target={"backend": "torch"})  # fmt: skip
    graph, _ = cast_model("patches", dtype=dtype, budget=LOOSE)
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(made.engine(pixels=pixels), run(graph, {"pixels": pixels}))


LOOSE = {"metric": "cosine", "limit": 0.99}


def test_onnxruntime_is_near_the_interpreter(tmp_path: Path) -> None:
    target = {"backend": "onnxruntime", "tactics": "fixed", "threads": 1}
    made = graphopt.compile(patches(), tmp_path / "e", passes=[*FUSED, {"kind": "cast"}], target=target)
    graph, _ = cast_model("patches")
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    got, expected = made.engine(pixels=pixels), run(graph, {"pixels": pixels})
    for name, tensor in expected.items():
        torch.testing.assert_close(torch.as_tensor(got[name]), tensor, atol=5e-3 * float(tensor.abs().max()), rtol=0)


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


# More of what is written

NORMED = f"""{HEAD}
    weight %n.weight: f32[8]
    weight %a.weight: f32[8, 8]
    %n: f32[batch, sequence, 8] = aten.rms_norm.default(input=%x, normalized_shape=[8], weight=%n.weight)
    %h: f32[batch, sequence, 8] = aten.linear.default(input=%n, weight=%a.weight)
    %y: f32[batch, sequence, 8] = aten.add.Tensor(self=%x, other=%h)
    output y = %y
"""
NORMED_AFTER = f"""{HEAD}
    weight %n.weight: f32[8]
    weight %a.weight.f16: f16[8, 8]
    %n: f32[batch, sequence, 8] = aten.rms_norm.default(input=%x, normalized_shape=[8], weight=%n.weight)
    %to: f16[batch, sequence, 8] = aten.to.dtype(self=%n, dtype=f16)
    %h: f16[batch, sequence, 8] = aten.linear.default(input=%to, weight=%a.weight.f16)
    %to_1: f32[batch, sequence, 8] = aten.to.dtype(self=%h, dtype=f32)
    %y: f32[batch, sequence, 8] = aten.add.Tensor(self=%x, other=%to_1)
    output y = %y
"""
SHARED = f"""{HEAD}
    weight %a.weight: f32[8, 8]
    %h: f32[batch, sequence, 8] = aten.linear.default(input=%x, weight=%a.weight)
    %e: f32[8, 8] = aten.exp.default(self=%a.weight)
    output y = %h
    output e = %e
"""
SHARED_AFTER = f"""{HEAD}
    weight %a.weight: f32[8, 8]
    weight %a.weight.f16: f16[8, 8]
    %to: f16[batch, sequence, 8] = aten.to.dtype(self=%x, dtype=f16)
    %h: f16[batch, sequence, 8] = aten.linear.default(input=%to, weight=%a.weight.f16)
    %to_1: f32[batch, sequence, 8] = aten.to.dtype(self=%h, dtype=f32)
    %e: f32[8, 8] = aten.exp.default(self=%a.weight)
    output y = %to_1
    output e = %e
"""


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize(
    ("before", "after"), [(NORMED, NORMED_AFTER), (SHARED, SHARED_AFTER)], ids=["residual", "shared"]
)
def test_writes(before: str, after: str, dtype: str) -> None:
    expected = program(after.replace("f16", {"fp16": "f16", "bf16": "bf16"}[dtype]))
    got = apply_pass(before, cast(dtype=dtype), Context()).text
    assert got == expected, difference(expected, got)


def test_twice_is_refused_and_leaves_all() -> None:
    graph, _ = cast_graph(NORMED)
    with pytest.raises(NoMatchError, match="cast changed nothing"):
        run_passes(graph, [cast()], context=Context())
    assert_idempotent(NORMED, cast())


def test_each_product_is_reported() -> None:
    _, context = cast_graph(NORMED, dtype="bf16")
    assert [(layer.module, layer.precision, layer.reason) for layer in context.layers] == [("a", "bf16", None)]


def test_the_nearest_module_is_told() -> None:
    graph = read(BEFORE)
    for node in graph.nodes:
        node.origin = ("third",)
    with pytest.raises(PassError, match="no module matches 'thrid'") as refused:
        run_passes(graph, [cast(keep=("thrid",))], context=Context())
    assert "third" in str(refused.value)


# Masks and numbers

SCORES = f"""{HEAD}
    weight %a.weight: f32[8, 8]
    input %seen: bool[batch, sequence, 8]
    %h: f32[batch, sequence, 8] = aten.linear.default(input=%x, weight=%a.weight)
    %m: f32[batch, sequence, 8] = aten.masked_fill.Scalar(self=%h, mask=%seen, value=VALUE)
    %p: f32[batch, sequence, 8] = aten.softmax.int(self=%m, dim=2)
    output p = %p
""".replace(
    "    weight %a.weight: f32[8, 8]\n    input %seen: bool[batch, sequence, 8]",
    "    input %seen: bool[batch, sequence, 8]\n    weight %a.weight: f32[8, 8]",
)
INPUT_MASK = f"""{HEAD}
    input %mask: f32[batch, sequence, 8]
    weight %a.weight: f32[8, 8]
    %h: f32[batch, sequence, 8] = aten.linear.default(input=%x, weight=%a.weight)
    %m: f32[batch, sequence, 8] = aten.add.Tensor(self=%h, other=%mask)
    %p: f32[batch, sequence, 8] = aten.softmax.int(self=%m, dim=2)
    output p = %p
"""
WEIGHT_MASK = INPUT_MASK.replace("    input %mask: f32[batch, sequence, 8]\n", "").replace(
    "8, 8]\n    %h", "8, 8]\n    weight %mask: f32[8]\n    %h"
)
MADE_MASK = f"""{HEAD}
    input %seen: bool[batch, sequence, 8]
    weight %a.weight: f32[8, 8]
    weight %zero: f32[]
    weight %low: f32[]
    %h: f32[batch, sequence, 8] = aten.linear.default(input=%x, weight=%a.weight)
    %mask: f32[batch, sequence, 8] = aten.where.self(condition=%seen, self=%zero, other=%low)
    %m: f32[batch, sequence, 8] = aten.add.Tensor(self=%h, other=%mask)
    %p: f32[batch, sequence, 8] = aten.softmax.int(self=%m, dim=2)
    output p = %p
"""
LOW = torch.finfo(torch.float32).min


def assert_probabilities(body: str, scale: float = 1.0) -> None:
    """Of rows that see nothing."""
    graph = read(body)
    for name, number in (("zero", 0.0), ("low", LOW), ("mask", LOW)):
        if name in graph.weights:
            graph.set_weight(name, Weight.of(torch.full(graph.weights[name].load().shape, number)))
    run_passes(graph, [cast()], context=Context())
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)) * scale
    masked = "masked_fill" in body
    given = {"x": x, "mask": torch.full((2, 3, 8), LOW), "seen": torch.full((2, 3, 8), masked)}
    got = run(graph, {name: given[name] for name in graph.inputs})["p"]
    torch.testing.assert_close(got.sum(-1), torch.ones(2, 3))


@pytest.mark.parametrize("value", ["-1000000000.0", "-3.4028234663852886e+38", "-1000000000"])
def test_a_filler_that_does_not_fit_keeps_its_op(value: str) -> None:
    body = SCORES.replace("VALUE", value)
    graph, _ = cast_graph(body)
    assert graph.value("m").type.dtype == torch.float32
    assert graph.value("h").type.dtype == torch.float16
    assert_probabilities(body)


@pytest.mark.parametrize("body", [INPUT_MASK, WEIGHT_MASK, MADE_MASK], ids=["given", "stored", "made"])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_additive_masks_leave_rows_without_nan(body: str, scale: float) -> None:
    assert_probabilities(body, scale)


class Turned(nn.Module):
    """Rotary angles as a Llama makes them."""

    def __init__(self) -> None:
        super().__init__()
        config = LlamaConfig(hidden_size=32, num_attention_heads=2, max_position_embeddings=8192)
        self.rotary, self.q = LlamaRotaryEmbedding(config), nn.Linear(16, 16)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        cos, sin = self.rotary(x, positions)
        q = self.q(x)
        result: Tensor = q * cos + rotate_half(q) * sin
        return result


@pytest.mark.parametrize(("dtype", "limit"), [("fp16", 3e-3), ("bf16", 3e-2)])
def test_rotary_angles_at_position_5000_are_eager_s(dtype: str, limit: float) -> None:
    """Half numbers near 5000 are 4 apart, bfloat's 32."""
    torch.manual_seed(0)
    module = Turned().eval()
    given = {"x": torch.randn(2, 6, 16), "positions": torch.arange(6).expand(2, 6)}
    graph = graphopt.trace(module, given, {"x": ("batch", "sequence", None), "positions": ("batch", "sequence")})
    run_passes(graph, [*load_passes(FUSED[:1]), cast(dtype=dtype)], context=Context())
    inputs = {"x": torch.randn(3, 7, 16), "positions": torch.arange(4997, 5004).expand(3, 7).contiguous()}
    with torch.no_grad():
        expected = module(**inputs)
    got = run(graph, inputs)["output"]
    torch.testing.assert_close(got, expected, atol=limit * float(expected.abs().max()), rtol=0)


def test_quantized_after_it_of_an_iterator(tmp_path: Path) -> None:
    def batches() -> Iterator[dict[str, Tensor]]:
        for seed in range(2):
            yield {"pixels": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))}

    before, proof = prepared("patches")
    graph = before.clone()
    steps = load_passes(
        [
            {"kind": "canonicalize"},
            {"kind": "cast"},
            {"kind": "quantize", "scheme": "int8_static", "calibration": {"data": batches()}},
        ]
    )[1:]
    *_, report = run_passes(graph, steps, context=Context(source=patches()), proof=proof)
    assert report.matches == {"int8_static": 4}
    assert report.parity is not None
    assert report.parity.holds
