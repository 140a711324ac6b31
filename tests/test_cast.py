"""cast: products in half precision, what loses by it in fp32."""

from __future__ import annotations

import functools
from collections.abc import Callable
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
from graphopt.ir import Graph
from graphopt.passes.cast import Cast
from graphopt.pipeline import Context, Proof, load_passes, run_passes
from graphopt.schemas.report import PassReport
from graphopt.sources import Source, transformers_source
from graphopt.tensors import DimRange, Weight
from tests.rules import apply_pass, assert_idempotent, difference, program, read
from tests.test_generation import llama
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


def test_layers_that_are_kept_are_reported_and_unknown_ones_refused() -> None:
    graph, context = read(BEFORE), Context()
    for node in graph.nodes:
        node.origin = ("first" if node.output.name == "h" else "second",)
    with pytest.raises(PassError, match="no module matches 'frist'") as refused:
        run_passes(graph.clone(), [cast(keep=("frist",))], context=Context())
    assert "'first'" in str(refused.value)
    run_passes(graph, [cast(keep=("first",))], context=context)
    assert [(layer.module, layer.precision, layer.reason) for layer in context.layers] == [
        ("a", "fp32", "kept"),
        ("a", "fp16", None),
    ]


def test_a_graph_without_products_is_refused() -> None:
    with pytest.raises(NoMatchError, match="cast changed nothing"):
        cast_graph(f"{HEAD}%y = aten.exp.default(self=%x)\noutput y = %y")


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
MODELS: dict[str, tuple[Callable[[], Source], list[dict[str, Any]]]] = {
    "bert": (tiny_bert, FUSED),
    "llama": (tiny_llama, FUSED),
    "cached llama": (lambda: transformers_source(llama()), FUSED + CACHE),
    "patches": (patches, FUSED),
    "eager llama": (lambda: tiny_llama("eager"), FUSED[:1]),
}


@functools.cache
def prepared(name: str) -> tuple[Graph, Proof]:
    """A model's graph before the cast, with probes: padding, two sizes, the first of them not the traced one."""
    make, steps = MODELS[name]
    source = make()
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


def wrong(reason: str, *values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.xfail(strict=True, reason=reason))


NEAR = [(name, dtype) for name in MODELS for dtype in ("fp16", "bf16")]


@pytest.mark.parametrize("norms", ["fp32", "half"])
@pytest.mark.parametrize(("name", "dtype"), NEAR)
def test_models_stay_near_eager(name: str, dtype: str, norms: str) -> None:
    """On probes with padding, at sizes that were not traced."""
    before, proof = prepared(name)
    limit = 0.999 if dtype == "fp16" else 0.99
    graph, report = cast_model(name, dtype=dtype, norms=norms, budget={"metric": "cosine", "limit": limit})
    kept = {node.outputs[0].type.dtype for node in graph.nodes if "_norm" in node.op}
    assert (torch.float32 in kept) == (norms == "fp32" and name != "eager llama")  # whose norms are spelled
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


@pytest.mark.parametrize(
    ("backend", "off"),
    [("torch", 1e-6), wrong("its tactics are held to less than what halves round", "onnxruntime", 5e-3)],
)
def test_engines_are_near_the_interpreter(backend: str, off: float, tmp_path: Path) -> None:
    made = graphopt.compile(patches(), tmp_path / "e", passes=[*FUSED, {"kind": "cast"}], target={"backend": backend})
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    (expected,), (got,) = (
        each.values() for each in (run(cast_model("patches")[0], {"pixels": pixels}), made.engine(pixels=pixels))
    )
    torch.testing.assert_close(torch.as_tensor(got), expected, atol=off * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("make", [tiny_bert, tiny_llama])
def test_onnxruntime_computes_halves(make: Any, tmp_path: Path) -> None:
    target = {"backend": "onnxruntime", "tactics": "fixed", "threads": 1}
    made = graphopt.compile(make(layers=1), tmp_path / "e", passes=[*FUSED, {"kind": "cast"}], target=target)
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
    data = iter(
        [{name: torch.ones_like(ids) if "mask" in name else ids * (name == "input_ids") for name in source.tensors}]
    )
    steps: list[dict[str, Any]] = [
        {"kind": "cast"},
        {"kind": "quantize", "scheme": "int8_static", "calibration": {"data": data}, "skip": ["pooler*"]},
    ]
    target = {"backend": "onnxruntime", "tactics": "fixed", "threads": 1}
    made = graphopt.compile(source, tmp_path / "e", passes=[*FUSED, *steps], target=target)
    layers = made.manifest.report.passes[-1].layers
    assert {layer.precision for layer in layers if layer.reason == "skipped"} == {"fp16"}


NORMED = f"""{HEAD}
    weight %n.weight: f32[8]
    weight %a.weight: f32[8, 8]
    %n = aten.rms_norm.default(input=%x, normalized_shape=[8], weight=%n.weight)
    %h = aten.linear.default(input=%n, weight=%a.weight)
    %again = aten.linear.default(input=%n, weight=%a.weight)
    %y = aten.add.Tensor(self=%x, other=%h)
    %e = aten.exp.default(self=%a.weight)
    output y = %y
    output again = %again
    output e = %e
"""
NORMED_AFTER = f"""{HEAD}
    weight %n.weight: f32[8]
    weight %a.weight: f32[8, 8]
    weight %a.weight.f16: f16[8, 8]
    %n = aten.rms_norm.default(input=%x, normalized_shape=[8], weight=%n.weight)
    %to = aten.to.dtype(self=%n, dtype=f16)
    %h = aten.linear.default(input=%to, weight=%a.weight.f16)
    %to_1 = aten.to.dtype(self=%h, dtype=f32)
    %again = aten.linear.default(input=%to, weight=%a.weight.f16)
    %to_2 = aten.to.dtype(self=%again, dtype=f32)
    %y = aten.add.Tensor(self=%x, other=%to_1)
    %e = aten.exp.default(self=%a.weight)
    output y = %y
    output again = %to_2
    output e = %e
"""


INNER = f"""{HEAD}
    weight %n.weight: f32[8]
    weight %a.weight: f32[8, 8]
    %h = aten.linear.default(input=%x, weight=%a.weight)
    %n = aten.rms_norm.default(input=%h, normalized_shape=[8], weight=%n.weight)
    %m = aten.rms_norm.default(input=%x, normalized_shape=[8], weight=%n.weight)
    %y = aten.linear.default(input=%n, weight=%a.weight)
    output y = %y
    output m = %m
"""
INNER_AFTER = f"""{HEAD}
    weight %n.weight: f32[8]
    weight %a.weight.f16: f16[8, 8]
    weight %n.weight.f16: f16[8]
    %to = aten.to.dtype(self=%x, dtype=f16)
    %h = aten.linear.default(input=%to, weight=%a.weight.f16)
    %n = aten.rms_norm.default(input=%h, normalized_shape=[8], weight=%n.weight.f16)
    %m = aten.rms_norm.default(input=%x, normalized_shape=[8], weight=%n.weight)
    %y = aten.linear.default(input=%n, weight=%a.weight.f16)
    %to_1 = aten.to.dtype(self=%y, dtype=f32)
    output y = %to_1
    output m = %m
"""


def test_fourier_transforms_stay_in_fp32() -> None:
    text = f"""{HEAD}
    weight %a.weight: f32[8, 8]
    %h = aten.linear.default(input=%x, weight=%a.weight)
    %c = aten.fft_fftn.default(self=%h, dim=[1, 2])
    %y = aten.real.default(self=%c)
    output y = %y
"""
    graph, _ = cast_graph(text)
    (transform,) = (node for node in graph.nodes if "fft" in node.op)
    assert transform.args["self"].type.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_norms_in_half_precision_where_nothing_is_wider(dtype: str) -> None:
    expected = program(INNER_AFTER.replace("f16", {"fp16": "f16", "bf16": "bf16"}[dtype]))
    got = apply_pass(INNER, cast(dtype=dtype, norms="half"), Context()).text
    assert got == expected, difference(expected, got)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize(("before", "after"), [(BEFORE, AFTER), (NORMED, NORMED_AFTER)], ids=["two", "residual"])
def test_writes(before: str, after: str, dtype: str) -> None:
    expected = program(after.replace("f16", {"fp16": "f16", "bf16": "bf16"}[dtype]))
    got = apply_pass(before, cast(dtype=dtype), Context()).text
    assert got == expected, difference(expected, got)


def test_twice_is_refused_and_leaves_all() -> None:
    graph, _ = cast_graph(NORMED)
    with pytest.raises(NoMatchError, match="cast changed nothing"):
        run_passes(graph, [cast()], context=Context())
    assert_idempotent(NORMED, cast())


# Masks and numbers

H = "weight %a.weight: f32[8, 8]\nDECLARED%h = aten.linear.default(input=%x, weight=%a.weight)\n"
P = "%p = aten.softmax.int(self=%m, dim=2)\noutput p = %p"
SEEN = "input %seen: bool[batch, sequence, 8]\n"
ADDED = f"{H}%m = aten.add.Tensor(self=%h, other=%mask)\n{P}"
FILLED = f"{HEAD}{SEEN}{H}%m = aten.masked_fill.Scalar(self=%h, mask=%seen, value=VALUE)\n{P}".replace("DECLARED", "")
MASKS = {
    "given": f"{HEAD}input %mask: f32[batch, sequence, 8]\n{ADDED}".replace("DECLARED", ""),
    "stored": f"{HEAD}{ADDED}".replace("DECLARED", "weight %mask: f32[8]\n"),
    "made": f"{HEAD}{SEEN}{ADDED}".replace("DECLARED", "weight %zero: f32[]\nweight %low: f32[]\n").replace(
        "%m =", "%mask = aten.where.self(condition=%seen, self=%zero, other=%low)\n%m ="
    ),
}
LOW = torch.finfo(torch.float32).min


def assert_probabilities(body: str, dtype: str = "fp16", score: float = 0.0) -> None:
    """Of rows that see nothing, whose scores are all the same."""
    graph = read(body)
    for name, number in (("zero", 0.0), ("low", LOW), ("mask", LOW), ("a.weight", score / 8)):
        if name in graph.weights:
            graph.set_weight(name, Weight.of(torch.full(graph.weights[name].load().shape, number)))
    run_passes(graph, [cast(dtype=dtype)], context=Context())
    masked = torch.full((2, 3, 8), "masked_fill" in body)
    given = {"x": torch.ones(2, 3, 8), "mask": torch.full((2, 3, 8), LOW), "seen": masked}
    got = run(graph, {name: given[name] for name in graph.inputs})["p"]
    torch.testing.assert_close(got, torch.full((2, 3, 8), 1 / 8))


@pytest.mark.parametrize(
    "value",
    ["-1000000000.0", "-3.4028234663852886e+38", wrong("whole numbers are not looked at", "-1000000000")],
)
def test_a_filler_that_does_not_fit_keeps_its_op(value: str) -> None:
    graph, _ = cast_graph(FILLED.replace("VALUE", value))
    assert [graph.value(name).type.dtype for name in "hm"] == [torch.float16, torch.float32]
    assert_probabilities(FILLED.replace("VALUE", value))


STORED = "a mask that is a weight becomes -inf"


@pytest.mark.parametrize(
    ("mask", "dtype", "score"),
    [
        ("given", "fp16", -80.0),
        ("given", "bf16", -80.0),
        wrong(STORED, "stored", "fp16", 0.0),
        wrong(STORED, "stored", "bf16", 0.0),
        ("made", "fp16", 0.0),
        ("made", "fp16", -80.0),
        ("made", "bf16", 0.0),
    ],
)
def test_additive_masks_leave_rows_without_nan(mask: str, dtype: str, score: float) -> None:
    assert_probabilities(MASKS[mask], dtype, score)


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
    run_passes(graph, load_passes([*FUSED[:1], {"kind": "cast", "dtype": dtype}]), context=Context())
    inputs = {"x": torch.randn(3, 7, 16), "positions": torch.arange(4997, 5004).expand(3, 7).contiguous()}
    with torch.no_grad():
        expected = module(**inputs)
    got = run(graph, inputs)["output"]
    torch.testing.assert_close(got, expected, atol=limit * float(expected.abs().max()), rtol=0)
