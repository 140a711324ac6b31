"""Caches of another dtype than the model's: what insert_kv_cache makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from graphopt.errors import CalibrationError
from graphopt.execution import run
from graphopt.ir import Graph
from graphopt.passes.fuse_cached_attention import (
    FuseCachedAttentions,
)
from graphopt.passes.insert_kv_cache import InsertKvCache
from graphopt.pipeline import Context, run_passes
from graphopt.runtime.cache import as_if_uncached, layout_of
from graphopt.sources import Source
from graphopt.text import parse
from tests.rules import (
    difference,
)
from tests.test_fuse_cached_attention import (
    OUTPUTS,
)

pytestmark = pytest.mark.usefixtures("kept_here")

# What the pass makes

HEAD = """\
  input %past_key_values.0.key: DTYPE[batch, 2, PAST, 8]
  input %past_key_values.0.value: DTYPE[batch, 2, PAST, 8]
  weight %k_proj: f32[16, 16]
  weight %v_proj: f32[16, 16]
"""
MIDDLE = """\
  %heads: f32[batch, sequence, 2, 8] = aten.reshape.default(self=%tokens, shape=[batch, sequence, 2, 8])
  %q: f32[batch, 2, sequence, 8] = aten.transpose.int(self=%heads, dim0=1, dim1=2)
  %linear: f32[batch, sequence, 16] = aten.linear.default(input=%tokens, weight=%k_proj)
  %k_heads: f32[batch, sequence, 2, 8] = aten.reshape.default(self=%linear, shape=[batch, sequence, 2, 8])
  %k: f32[batch, 2, sequence, 8] = aten.transpose.int(self=%k_heads, dim0=1, dim1=2)
  %linear_1: f32[batch, sequence, 16] = aten.linear.default(input=%tokens, weight=%v_proj)
  %v_heads: f32[batch, sequence, 2, 8] = aten.reshape.default(self=%linear_1, shape=[batch, sequence, 2, 8])
  %v: f32[batch, 2, sequence, 8] = aten.transpose.int(self=%v_heads, dim0=1, dim1=2)
"""
BEFORE = f"""\
graph {{
  dim batch in [1, 8]
  dim sequence in [1, 64]
  input %tokens: f32[batch, sequence, 16]
  input %mask: i64[batch, sequence] in {{0, 1}}
  weight %k_proj: f32[16, 16]
  weight %v_proj: f32[16, 16]
  %real: bool[batch, sequence] = aten.to.dtype(self=%mask, dtype=bool)
{MIDDLE}\
  %a: f32[batch, 2, sequence, 8] = graphopt.attention.default(q=%q, k=%k, v=%v, key_mask=%real, scale=0.5, causal="upper_left")
  output y = %a
}}
"""
GROWING = f"""\
graph {{
  dim batch in [1, 8]
  dim sequence in [1, 64]
  dim past in [0, 63]
  input %tokens: f32[batch, sequence, 16]
  input %mask: i64[batch, past + sequence] in {{0, 1}}
{HEAD.replace("PAST", "past")}\
SCALES  %to: bool[batch, past + sequence] = aten.to.dtype(self=%mask, dtype=bool)
{MIDDLE}\
"""
STATIC = f"""\
graph {{
  dim batch in [1, 8]
  dim sequence in [1, 16]
  input %tokens: f32[batch, sequence, 16]
  input %past_lengths: i64[batch]
{HEAD.replace("PAST", "16")}\
SCALES{MIDDLE}\
"""
HALF_GROWING = """\
  %to_1: f16[batch, 2, sequence, 8] = aten.to.dtype(self=%k, dtype=f16)
  %to_2: f16[batch, 2, sequence, 8] = aten.to.dtype(self=%v, dtype=f16)
  %cat: f16[batch, 2, past + sequence, 8] = aten.cat.default(tensors=[%past_key_values.0.key, %to_1], dim=2)
  %to_3: f32[batch, 2, past + sequence, 8] = aten.to.dtype(self=%cat, dtype=f32)
  %cat_1: f16[batch, 2, past + sequence, 8] = aten.cat.default(tensors=[%past_key_values.0.value, %to_2], dim=2)
  %to_4: f32[batch, 2, past + sequence, 8] = aten.to.dtype(self=%cat_1, dtype=f32)
  %a: f32[batch, 2, sequence, 8] = graphopt.attention.default(q=%q, k=%to_3, v=%to_4, MASKED, LOWER)
  output y = %a
  output present.0.key = %cat
  output present.0.value = %cat_1
}
"""
INT8_GROWING = """\
  %quantize: i8[batch, 2, sequence, 8] = graphopt.quantize.default(x=%k, scale=%k.scale)
  %quantize_1: i8[batch, 2, sequence, 8] = graphopt.quantize.default(x=%v, scale=%v.scale)
  %cat: i8[batch, 2, past + sequence, 8] = aten.cat.default(tensors=[%past_key_values.0.key, %quantize], dim=2)
  %dequantize: f32[batch, 2, past + sequence, 8] = graphopt.dequantize.default(x=%cat, scale=%k.scale)
  %cat_1: i8[batch, 2, past + sequence, 8] = aten.cat.default(tensors=[%past_key_values.0.value, %quantize_1], dim=2)
  %dequantize_1: f32[batch, 2, past + sequence, 8] = graphopt.dequantize.default(x=%cat_1, scale=%v.scale)
  %a: f32[batch, 2, sequence, 8] = graphopt.attention.default(q=%q, k=%dequantize, v=%dequantize_1, MASKED, LOWER)
  output y = %a
  output present.0.key = %cat
  output present.0.value = %cat_1
}
"""
HALF_STATIC = """\
  %to: f16[batch, 2, sequence, 8] = aten.to.dtype(self=%k, dtype=f16)
  %to_1: f16[batch, 2, sequence, 8] = aten.to.dtype(self=%v, dtype=f16)
  %kv_cache_update: f16[batch, 2, 16, 8] = graphopt.kv_cache_update.default(cache=%past_key_values.0.key, new=%to, STARTS)
  %to_2: f32[batch, 2, 16, 8] = aten.to.dtype(self=%kv_cache_update, dtype=f32)
  %kv_cache_update_1: f16[batch, 2, 16, 8] = graphopt.kv_cache_update.default(cache=%past_key_values.0.value, new=%to_1, STARTS)
  %to_3: f32[batch, 2, 16, 8] = aten.to.dtype(self=%kv_cache_update_1, dtype=f32)
  %a: f32[batch, 2, sequence, 8] = graphopt.attention.default(q=%q, k=%to_2, v=%to_3, STARTS, scale=0.5, causal="upper_left")
  output y = %a
  output present.0.key = %kv_cache_update
  output present.0.value = %kv_cache_update_1
}
"""
INT8_STATIC = """\
  %quantize: i8[batch, 2, sequence, 8] = graphopt.quantize.default(x=%k, scale=%k.scale)
  %quantize_1: i8[batch, 2, sequence, 8] = graphopt.quantize.default(x=%v, scale=%v.scale)
  %kv_cache_update: i8[batch, 2, 16, 8] = graphopt.kv_cache_update.default(cache=%past_key_values.0.key, new=%quantize, STARTS)
  %dequantize: f32[batch, 2, 16, 8] = graphopt.dequantize.default(x=%kv_cache_update, scale=%k.scale)
  %kv_cache_update_1: i8[batch, 2, 16, 8] = graphopt.kv_cache_update.default(cache=%past_key_values.0.value, new=%quantize_1, STARTS)
  %dequantize_1: f32[batch, 2, 16, 8] = graphopt.dequantize.default(x=%kv_cache_update_1, scale=%v.scale)
  %a: f32[batch, 2, sequence, 8] = graphopt.attention.default(q=%q, k=%dequantize, v=%dequantize_1, STARTS, scale=0.5, CAUSAL)
  output y = %a
  output present.0.key = %kv_cache_update
  output present.0.value = %kv_cache_update_1
}
"""  # noqa: E501
WITH_LENGTH: dict[str, Any] = {"layout": "static", "max_length": 16}
LAYOUTS: dict[str, dict[str, Any]] = {"growing": {}, "static": WITH_LENGTH}
AFTER = {
    ("growing", "fp16"): GROWING + HALF_GROWING,
    ("growing", "int8"): GROWING + INT8_GROWING,
    ("static", "fp16"): STATIC + HALF_STATIC,
    ("static", "int8"): STATIC + INT8_STATIC,
}


def after(layout: str, dtype: str, scales: str) -> str:
    """The text that the pass should make."""
    size = {"head": 1, "channel": 8, "": 0}[scales]
    weights = "".join(f"  weight %{name}.scale: f32[1, 2, 1, {size}]\n" for name in "kv") if scales else ""
    text = AFTER[layout, dtype].replace("SCALES", weights).replace("DTYPE", {"fp16": "f16", "int8": "i8"}[dtype])
    text = text.replace("STARTS", "starts=%past_lengths").replace("CAUSAL", 'causal="upper_left"')
    return text.replace("MASKED", "key_mask=%to, scale=0.5").replace("LOWER", 'causal="lower_right"')


def eighths(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers whose products with one another add up without rounding, in whatever order."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 8).round() / 8


def batch_of(rows: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Tokens whose last row is padded behind its half."""
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[-1, length - length // 2 :] = 0
    return {"tokens": eighths(rows, length, 16, seed=seed), "mask": mask}


WEIGHTS = {name: eighths(16, 16, seed=index) for index, name in enumerate(("k_proj", "v_proj"))}
DATA = [batch_of(3, 12, seed) for seed in range(3)]
SOURCE = Source(
    nn.Identity(),
    {**batch_of(2, 6)},
    {"tokens": ("batch", "sequence", None), "mask": ("batch", "sequence")},
    mask="mask",
)


def options_of(dtype: str, scales: str = "", **more: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"dtype": dtype, **more}
    if dtype == "int8":
        given |= {"calibration": {"data": DATA}} | ({"scales": scales} if scales else {})
    return given


def inserted(
    options: Mapping[str, Any], text: str = BEFORE, weights: Mapping[str, Tensor] = WEIGHTS, source: Source = SOURCE
) -> Graph:
    graph = parse(text, weights)
    InsertKvCache(**options).run(graph, Context(source=source))
    graph.verify()
    return graph


@pytest.mark.parametrize(("dtype", "scales"), [("fp16", ""), ("int8", "head"), ("int8", "channel")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_it_makes(layout: str, dtype: str, scales: str) -> None:
    got = inserted(LAYOUTS[layout] | options_of(dtype, scales)).text()
    assert got == after(layout, dtype, scales), difference(after(layout, dtype, scales), got)


def test_scales_are_of_channels_unless_said_otherwise() -> None:
    assert inserted(options_of("int8")).text() == after("growing", "int8", "channel")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_the_model_computes_in_is_no_change(layout: str) -> None:
    options = LAYOUTS[layout]
    assert inserted(options | {"dtype": "fp32"}).text() == inserted(options).text()


def test_keys_that_are_values_have_one_scale() -> None:
    text = BEFORE.replace("v=%v,", "v=%k,")
    text = "".join(line for line in text.splitlines(True) if "%v" not in line)
    graph = inserted(options_of("int8"), text, {"k_proj": WEIGHTS["k_proj"]})
    assert list(graph.weights) == ["k_proj", "k.scale"]
    assert graph.text().count("scale=%k.scale") == 4


def by_heads(x: Tensor) -> Tensor:
    return x.reshape(*x.shape[:2], 2, 8).transpose(1, 2)


def keys_or_values(inputs: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """``[batch, heads, sequence, features]`` by plain torch."""
    return by_heads(inputs["tokens"] @ weight.T)


def largest(each: str, weight: Tensor) -> Tensor:
    """The largest magnitudes in the data at what is no padding, ``[1, heads, 1, features or 1]``."""
    rows = [keys_or_values(batch, weight).transpose(1, 2)[batch["mask"].bool()] for batch in DATA]
    found = torch.cat(rows).abs().amax(0)[None, :, None, :]
    return found.amax(3, keepdim=True) if each == "head" else found


@pytest.mark.parametrize("each", ["head", "channel"])
def test_scales_take_the_largest_magnitude_to_127(each: str) -> None:
    graph = inserted(options_of("int8", each))
    for name in "kv":
        expected = largest(each, WEIGHTS[f"{name}_proj"]) / 127
        torch.testing.assert_close(graph.weights[f"{name}.scale"].load(), expected, rtol=1e-5, atol=0)


def round_to_half(x: Tensor, scale: Tensor) -> Tensor:
    return x.half().float()


def round_to_int8(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).round().clamp(-128, 127) * scale


ROUNDINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"fp16": round_to_half, "int8": round_to_int8}


def attended(inputs: Mapping[str, Tensor], dtype: str, each: str = "channel", window: int | None = None) -> Tensor:
    """Plain torch on the whole text: attention over keys and values that are rounded, and nothing else is."""
    q = by_heads(inputs["tokens"])
    parts = [
        ROUNDINGS[dtype](keys_or_values(inputs, WEIGHTS[name]), largest(each, WEIGHTS[name]) / 127)
        for name in ("k_proj", "v_proj")
    ]
    places = torch.arange(q.shape[2])
    far = places[:, None] - places
    visible = (far >= 0) & (far < (window or q.shape[2]))
    return functional.scaled_dot_product_attention(q, parts[0], parts[1], visible, scale=0.5)


def stepped(graph: Graph, inputs: Mapping[str, Tensor]) -> Tensor:
    """A prompt and further steps."""
    layout = layout_of(graph)
    assert layout is not None
    return as_if_uncached(lambda feeds: run(graph, feeds), layout, inputs, inputs["mask"]).outputs["y"]


def assert_real_positions(got: Tensor, expected: Tensor, mask: Tensor, tolerance: float = 1e-5) -> None:
    got, expected = (tensor.transpose(1, 2)[mask.bool()] for tensor in (got, expected))
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("batch", "sequence"), [(1, 1), (2, 6), (3, 16)])
@pytest.mark.parametrize(("dtype", "each"), [("fp16", ""), ("int8", "head"), ("int8", "channel")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_are_attention_over_rounded_keys_and_values(
    layout: str, dtype: str, each: str, batch: int, sequence: int
) -> None:
    """Also of other texts than those of the data, where some numbers are larger and are cut."""
    inputs = batch_of(batch, sequence, seed=7)
    inputs["tokens"][0, 0] *= 3
    got = stepped(inserted(LAYOUTS[layout] | options_of(dtype, each)), inputs)
    assert_real_positions(got, attended(inputs, dtype, each or "channel"), inputs["mask"])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_windows_keep_rounded_keys_and_values(dtype: str, fused: bool) -> None:
    """In buffers shorter than the text, whose front is moved over."""
    text = BEFORE.replace('causal="upper_left"', 'causal="upper_left", window_left=3')
    graph = inserted(WITH_LENGTH | options_of(dtype, window=True), text)
    assert graph.inputs["past_key_values.0.key"].type.shape[2] == 7
    if fused:
        run_passes(graph, [FuseCachedAttentions()])
        assert "kv_cache_update.default" not in graph.text()
    inputs = batch_of(2, 16, seed=3)
    assert_real_positions(stepped(graph, inputs), attended(inputs, dtype, window=4), inputs["mask"])


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_fused_and_unfused_steps_are_the_same(dtype: str) -> None:
    graph = inserted(WITH_LENGTH | options_of(dtype))
    fused = graph.clone()
    (report,) = run_passes(fused, [FuseCachedAttentions()])
    rule = {"fp16": "FuseHalfCachedAttention", "int8": "FuseInt8CachedAttention"}[dtype]
    assert report.matches[rule] == 1
    for rows, length in ((2, 6), (3, 13)):
        inputs = batch_of(rows, length, seed=5)
        assert_real_positions(stepped(fused, inputs), stepped(graph, inputs), inputs["mask"])


def silent(name: str, row: int) -> dict[str, Tensor]:
    """Weights by which one feature of keys or values is always 0."""
    weight = WEIGHTS[name].clone()
    weight[row] = 0
    return WEIGHTS | {name: weight}


def test_a_channel_that_is_always_0_stays_0() -> None:
    graph = inserted(options_of("int8"), weights=silent("v_proj", 3))
    scale = graph.weights["v.scale"].load()
    assert bool((scale > 0).all())
    got = stepped(graph, batch_of(2, 6))
    assert bool((got[:, 0, :, 3] == 0).all())
    assert bool(got.isfinite().all())


def test_keys_that_are_always_0_are_refused() -> None:
    with pytest.raises(CalibrationError, match="%k is 0 for all of the data"):
        inserted(options_of("int8"), weights=WEIGHTS | {"k_proj": torch.zeros(16, 16)})


def test_a_channel_that_is_always_0_in_a_model_of_16_bits() -> None:
    text = BEFORE.replace("f32", "f16")
    source = Source(nn.Identity(), {**SOURCE.inputs, "tokens": eighths(2, 6, 16).half()}, SOURCE.axes, mask="mask")
    weights = {name: tensor.half() for name, tensor in silent("v_proj", 3).items()}
    graph = inserted(options_of("int8"), text, weights, source)
    assert bool((graph.weights["v.scale"].load() > 0).all())


# The rules

SCALED = """
    weight %ks: f32[1, 2, 1, 32]
    weight %vs: f32[1, 2, 1, 32]
"""


def caches(head: str, dtype: str, scales: str = "") -> str:
    """Inputs of a dtype, and weights before the first line that computes something."""
    for name in ("past_k", "past_v"):
        head = head.replace(f"%{name}: f32", f"%{name}: {dtype}")
    lines = [line for line in head.splitlines() if line.strip()]
    first = next((index for index, line in enumerate(lines) if " = " in line), len(lines))
    return "\n".join([*lines[:first], scales, *lines[first:]])


def fused(
    head: str, tensors: str = "", args: str = "", turned: bool = False, dtype: str = "i8", scaled: str = SCALED
) -> str:
    scales, scaled = ("k_scale=%ks, v_scale=%vs, ", scaled) if dtype == "i8" else ("", "")
    call = f"q=%q, k=%k, v=%v, k_cache=%past_k, v_cache=%past_v, starts=%starts, {tensors}{scales}scale=0.5{args}"
    if not turned:
        return f"{caches(head, dtype, scaled)}\n%a, %k2, %v2 = graphopt.cached_attention.default({call})\n{OUTPUTS}"
    return f"""{caches(head, dtype, scaled)}
        %cached_attention, %k2, %v2 = graphopt.cached_attention.default({call}, heads_last=True)
        %a = aten.transpose.int(self=%cached_attention, dim0=1, dim1=2)
        {OUTPUTS}"""
