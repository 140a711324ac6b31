"""FuseSpelledAttention: what it refuses, and why."""

from __future__ import annotations

import pytest

from tests.rules import (
    QKV,
    assert_becomes,
    assert_keeps,
    assert_not_matched,
    assert_refuses,
    attention,
)
from tests.test_spelled_attention import (
    BIAS,
    BY_FACTOR,
    FACTOR,
    HIDDEN,
    MASK,
    Q_SCALED,
    RULE,
    RULES,
    SHOWN,
    capped,
    filled,
    plus,
    spelled,
    times,
)

# Refusals


def test_values_that_are_used_elsewhere_are_refused() -> None:
    for value, op in (("w", "softmax.int"), ("s", "matmul.default"), ("m", "mul.Tensor")):
        body = spelled(times(0.5))
        reason = f"%{value} (aten.{op}) is also used by"
        assert_refuses(f"{body}\noutput z = %{value}", RULE, f"{reason} an output")
        used = body.replace("output y", f"%z = aten.neg.default(self=%{value})\noutput z = %z\noutput y")
        assert_refuses(used, RULE, f"{reason} aten.neg.default")


def test_keys_and_scaled_queries_may_be_used_elsewhere() -> None:
    body = spelled(head=Q_SCALED, q="%qs") + "\noutput z = %qs\noutput t = %t"
    turned = "%t = aten.transpose.int(self=%k, dim0=2, dim1=3)"
    after = attention(f"{Q_SCALED}{turned}", "scale=1.0", qkv="q=%qs, k=%k, v=%v")
    assert_becomes(body, f"{after}\noutput z = %qs\noutput t = %t", RULES)


FLAT = """
    dim keys in [1, ...]
    input %q: f32[5, 8]
    input %k: f32[keys, 8]
    input %v: f32[keys, 6]
    %t = aten.transpose.int(self=%k, dim0=0, dim1=1)
    %s = aten.matmul.default(self=%q, other=%t)
    %w = aten.softmax.int(self=%s, dim=1)
    %o = aten.matmul.default(self=%w, other=%v)
    output y = %o"""
ZERO = "m = div.Tensor(self=%s, other=0.0)"
INTEGERS = BIAS.replace("bias: f32", "bias: i64")
BY_KEYS = FACTOR.replace("4, 1, 1", "batch, 1, 1, keys")
MIXED = spelled(head=QKV.replace("%v: f32", "%v: f64"), after=["r = to.dtype(self=%w, dtype=f64)"])


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (FLAT, "the scores have 2 dimensions"),
        (spelled(axis=2), "the softmax is not over the keys"),
        (MIXED, "mixed dtypes"),
        (spelled(ZERO), "the scores are divided by zero"),
        (spelled(*capped("s"), times(0.5, "c")), "the scores are scaled after they are capped"),
        (spelled(plus(), *capped("b"), head=BIAS), "the scores are capped after a mask"),
        (spelled(SHOWN, *capped("f"), head=MASK), "the scores are capped after a mask"),
        (spelled(plus(), times(-1.0, "b"), head=BIAS), "a mask is turned round"),
        (spelled(SHOWN, times(-1.0, "f"), head=MASK), "a mask is turned round"),
        (spelled(plus(), head=INTEGERS), "what is added to the scores is not floating"),
        (spelled(filled(-100.0), head=HIDDEN), "hidden scores become -100, which does not hide them"),
        (
            spelled(SHOWN.replace("-inf", "0.0"), head=MASK),
            "hidden scores become 0, which does not hide them",
        ),
        (
            spelled(plus(), BY_FACTOR.replace("%s", "%b"), head=BIAS + "input %factor: f32[4, 1, 1]\n"),
            "the scores are multiplied after a mask",
        ),
        (
            spelled(head=BY_KEYS, after=[BY_FACTOR.replace("%s", "%w")]),
            "the weights are multiplied by %factor (f32[batch, 1, 1, keys]), which is not one number for each head",
        ),
        (
            spelled(head=QKV.replace("%v: f32[batch, 4", "%v: f32[batch, 1")),
            "k is f32[batch, 4, keys, 8], v f32[batch, 1, keys, 6]",
        ),
        (spelled(head=QKV.replace("%q: f32[batch, 4", "%q: f32[batch, 1")), "q has 1 heads, k 4"),
        (spelled(head=QKV.replace("%q: f32[batch", "%q: f32[1")), "%q is f32[1, 4, sequence, 8]: its heads differ"),
        (
            spelled(head=QKV.replace("%v: f32[batch", "%v: f32[1").replace("%k: f32[batch", "%k: f32[1")),
            "%t is f32[1, 4, 8, keys]: its heads differ",
        ),
    ],
)
def test_refuses(body: str, reason: str) -> None:
    assert_refuses(body, RULE, reason)


GIVEN = f"{BIAS}%w = aten.softmax.int(self=%bias, dim=3)\n%o = aten.matmul.default(self=%w, other=%v)\noutput y = %o"


@pytest.mark.parametrize(
    "body",
    [
        spelled("b = add.Tensor(self=%s, other=%bias, alpha=2)", head=BIAS),
        spelled('m = div.Tensor_mode(self=%s, other=4.0, rounding_mode="floor")'),
        spelled("d = div.Tensor(self=%s, other=3.0)", "h = tanh.default(self=%d)", times(2.0, "h")),
        spelled("n = neg.default(self=%s)"),
        spelled("b = sub.Tensor(self=%s, other=%bias)", head=BIAS),
        spelled().replace("softmax.int", "log_softmax.int"),
        spelled(after=["h = relu.default(self=%w)"]),
        GIVEN,
    ],
)
def test_what_is_no_attention_does_not_match(body: str) -> None:
    assert_not_matched(body, RULE)


def test_a_bias_that_widens_the_batch_is_no_crash() -> None:
    head = BIAS.replace("%q: f32[batch", "%q: f32[1").replace("%k: f32[batch", "%k: f32[1")
    assert_keeps(spelled(plus(), head=head.replace("%v: f32[batch", "%v: f32[1")), *RULES)


def test_truths_that_are_added_stay_numbers() -> None:
    """``scores + bool`` adds one; a bool ``bias`` of attention would hide keys instead."""
    body = spelled(plus("mask"), head=MASK)
    assert_refuses(body, RULE, "what is added to the scores is not floating")
