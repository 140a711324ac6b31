"""Caches of another dtype than the model's: what the rules make of them."""

from __future__ import annotations

import pytest

from graphopt.passes.fuse_cached_attention import (
    FuseCachedAttentions,
    FuseHalfCachedAttention,
    FuseInt8CachedAttention,
)
from tests.rules import (
    Case,
    apply_pass,
    assert_equal,
    assert_fires,
    assert_idempotent,
    assert_not_matched,
    assert_refuses,
    difference,
    program,
)
from tests.test_cache_dtype import SCALED, caches, fused
from tests.test_fuse_cached_attention import (
    ANGLES,
    FIRST,
    LAST,
    OUTPUTS,
    PLACES,
    ROTATED,
    TABLES,
    TURNED,
    TURNED_ROTARY,
)

pytestmark = pytest.mark.usefixtures("kept_here")


def quantized(
    head: str = FIRST, names: str = "q k v", args: str = "", scales: str = "ks vs", scaled: str = SCALED
) -> str:
    """Caches of int8 as insert_kv_cache writes and reads them."""
    q, k, v = names.split()
    ks, vs = scales.split()
    return f"""{caches(head, "i8", scaled)}
        %ik = graphopt.quantize.default(x=%{k}, scale=%{ks})
        %iv = graphopt.quantize.default(x=%{v}, scale=%{vs})
        %k2 = graphopt.kv_cache_update.default(cache=%past_k, new=%ik, starts=%starts)
        %dk = graphopt.dequantize.default(x=%k2, scale=%ks)
        %v2 = graphopt.kv_cache_update.default(cache=%past_v, new=%iv, starts=%starts)
        %dv = graphopt.dequantize.default(x=%v2, scale=%vs)
        %a = graphopt.attention.default(q=%{q}, k=%dk, v=%dv, starts=%starts, scale=0.5, causal="upper_left"{args})
        {OUTPUTS}"""


def halved(head: str = FIRST, names: str = "q k v", args: str = "", dtype: str = "f16") -> str:
    """Caches of another float."""
    q, k, v = names.split()
    return f"""{caches(head, dtype)}
        %hk = aten.to.dtype(self=%{k}, dtype={dtype})
        %hv = aten.to.dtype(self=%{v}, dtype={dtype})
        %k2 = graphopt.kv_cache_update.default(cache=%past_k, new=%hk, starts=%starts)
        %dk = aten.to.dtype(self=%k2, dtype=f32)
        %v2 = graphopt.kv_cache_update.default(cache=%past_v, new=%hv, starts=%starts)
        %dv = aten.to.dtype(self=%v2, dtype=f32)
        %a = graphopt.attention.default(q=%{q}, k=%dk, v=%dv, starts=%starts, scale=0.5, causal="upper_left"{args})
        {OUTPUTS}"""


TABLED, ANGLED = "cos=%cos, sin=%sin, ", FIRST + TABLES + PLACES + ANGLES + ROTATED
TURNED_ANGLED = LAST + TABLES + PLACES + ANGLES + TURNED_ROTARY
EVERYTHING = ", window_left=7, chunk=9, softcap=5.0"
ONE_EACH = SCALED.replace("2, 1, 32]", "2, 1, 1]")
ONE = SCALED.replace("[1, 2, 1, 32]", "[]")
EIGHT, SIXTEEN = FuseInt8CachedAttention(), FuseHalfCachedAttention()
CASES = [
    Case("int8", EIGHT, quantized(), fused(FIRST)),
    Case("int8, a scale a head", EIGHT, quantized(scaled=ONE_EACH), fused(FIRST, scaled=ONE_EACH)),
    Case("int8, one scale", EIGHT, quantized(scaled=ONE), fused(FIRST, scaled=ONE)),
    Case("int8, everything", EIGHT, quantized(args=EVERYTHING), fused(FIRST, args=EVERYTHING)),
    Case("int8, rotary", EIGHT, quantized(ANGLED, "rq rk v"), fused(FIRST + TABLES, TABLED)),
    Case("int8, transposes", EIGHT, quantized(LAST + TURNED, "qt kt vt"), fused(LAST, turned=True)),
    Case("int8, all of it", EIGHT, quantized(TURNED_ANGLED, "rq rk vt"), fused(LAST + TABLES, TABLED, turned=True)),
    Case("fp16", SIXTEEN, halved(), fused(FIRST, dtype="f16")),
    Case("fp16, everything", SIXTEEN, halved(args=EVERYTHING), fused(FIRST, args=EVERYTHING, dtype="f16")),
    Case("fp16, rotary", SIXTEEN, halved(ANGLED, "rq rk v"), fused(FIRST + TABLES, TABLED, dtype="f16")),
    Case("fp16, transposes", SIXTEEN, halved(LAST + TURNED, "qt kt vt"), fused(LAST, turned=True, dtype="f16")),
    Case(
        "fp16, all of it",
        SIXTEEN,
        halved(TURNED_ANGLED, "rq rk vt"),
        fused(LAST + TABLES, TABLED, turned=True, dtype="f16"),
    ),
    Case("bf16", SIXTEEN, halved(dtype="bf16"), fused(FIRST, dtype="bf16")),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fires(case: Case) -> None:
    assert_fires(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equal(case: Case) -> None:
    assert_equal(case)


@pytest.mark.parametrize("case", [CASES[6], CASES[11]], ids=str)
def test_the_pass_does_it_once(case: Case) -> None:
    applied = apply_pass(case.before, FuseCachedAttentions())
    assert applied.matches[case.rule.name] == 1
    assert applied.text == program(case.after), difference(program(case.after), applied.text)
    assert_idempotent(case.before, FuseCachedAttentions())


@pytest.mark.parametrize(
    "body",
    [
        quantized(scales="vs ks"),
        quantized(scaled=SCALED + "weight %other: f32[1, 2, 1, 32]\n", scales="other vs"),
        quantized(caches(FIRST, "i8")).replace("new=%iv", "new=%ik"),
    ],
    ids=["scales of one another", "keys by another scale", "values that were keys"],
)
def test_scales_that_differ_are_not_matched(body: str) -> None:
    assert_not_matched("\n".join(line for line in body.splitlines() if not _is_dead(line, body)), EIGHT)


def _is_dead(line: str, body: str) -> bool:
    name = line.strip().partition(" = ")[0]
    return name.startswith("%") and " = " in line and body.count(name) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ((', causal="upper_left"', ""), "its queries stand elsewhere than its keys"),
        (("v=%dv, starts=%starts, ", "v=%dv, "), "its queries stand elsewhere than its keys"),
        ((", 32]", ", 12]"), "its heads are of 12, which kernels read in eights"),
    ],
)
@pytest.mark.parametrize("rule", [EIGHT, SIXTEEN], ids=["int8", "fp16"])
def test_refusals(
    rule: FuseInt8CachedAttention | FuseHalfCachedAttention, change: tuple[str, str], reason: str
) -> None:
    body = quantized() if rule is EIGHT else halved()
    assert_refuses(body.replace(*change), rule, reason)


def test_a_cache_that_is_read_in_part_stays() -> None:
    """Values that go into attention as they are in the model, keys as halves."""
    body = halved().replace("%past_v: f16", "%past_v: f32").replace("new=%hv", "new=%v").replace("v=%dv", "v=%v2")
    body = "\n".join(line for line in body.splitlines() if "%hv =" not in line and "%dv =" not in line)
    assert_not_matched(body, SIXTEEN)


@pytest.mark.parametrize("rule", [EIGHT, SIXTEEN], ids=["int8", "fp16"])
def test_keys_that_go_out_as_they_are_read_are_refused(rule: FuseInt8CachedAttention | FuseHalfCachedAttention) -> None:
    body = (quantized() if rule is EIGHT else halved()) + "output keys = %dk\n"
    op = "graphopt.dequantize.default" if rule is EIGHT else "aten.to.dtype"
    assert_refuses(body, rule, f"%dk ({op}) is also used by an output")
