"""fuse_attention: the framework's own op, grouped heads, what the pass reports."""

from __future__ import annotations

from typing import Any

import pytest

from graphopt.errors import NoMatchError
from graphopt.passes.einsum import ProductOfEinsum
from graphopt.passes.fuse_attention import FoldRepeatKv, FuseAttention, FuseSdpa, ProveMask
from graphopt.passes.moves import MOVES
from graphopt.passes.rotary import ROTARY
from graphopt.passes.spelled_attention import FuseSpelledAttention
from graphopt.rewrite import Rule
from tests.rules import (
    DIMS,
    GROUPED,
    QKV,
    Case,
    apply,
    apply_pass,
    assert_equal,
    assert_equal_runs,
    assert_fires,
    assert_idempotent,
    assert_not_matched,
    assert_refuses,
    attention,
    lines,
    program,
)

RESULT = "f32[batch, 4, sequence, 6]"


def assert_attends(body: str, rule: Rule, head: str, *args: str) -> None:
    """The rule makes one attention with these arguments, and it computes the same."""
    case = Case("attention", rule, body, attention(head, *args))
    assert_fires(case)
    assert_equal(case)


# scaled_dot_product_attention


def sdpa(head: str = QKV, args: str = "", type: str = RESULT) -> str:
    call = f"aten.scaled_dot_product_attention.default(query=%q, key=%k, value=%v{args})"
    return f"{head}\n%o: {type} = {call}\noutput y = %o"


ADDED = f"{QKV}input %bias: f32[batch, 1, sequence, keys]\n"
TRUTHS = f"{QKV}input %mask: bool[batch, 1, sequence, keys]\n"
DEFAULT = "scale=0.35355339059327373"


@pytest.mark.parametrize(
    ("head", "args", "after"),
    [
        (QKV, "", (DEFAULT,)),
        (QKV, ", scale=0.5", ("scale=0.5",)),
        (QKV, ", is_causal=True", (DEFAULT, 'causal="upper_left"')),
        (ADDED, ", attn_mask=%bias", ("bias=%bias", DEFAULT)),
        (TRUTHS, ", attn_mask=%mask", ("bias=%mask", DEFAULT)),
        (GROUPED, ", enable_gqa=True", (DEFAULT,)),
        (QKV, ", enable_gqa=True", (DEFAULT,)),
        (QKV.replace("batch, 4, keys", "batch, 1, keys"), "", (DEFAULT,)),  # broadcast, as Falcon's single head is
    ],
)
def test_sdpa_fires_and_is_equal(head: str, args: str, after: tuple[str, ...]) -> None:
    assert_attends(sdpa(head, args), FuseSdpa(), head, *after)


DYNAMIC = """
    dim batch in [1, ...]
    dim sequence in [1, ...]
    dim width in [1, ...]
    input %q: f32[batch, 4, sequence, width]
    input %k: f32[batch, 4, sequence, width]
    input %v: f32[batch, 4, sequence, 6]
"""


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (sdpa(args=", dropout_p=0.1"), "it has dropout"),
        (sdpa(DYNAMIC), "the default scale of a dynamic head size"),
        (
            sdpa(QKV.replace("batch, 4, ", "batch, "), type="f32[batch, sequence, 6]"),
            "q has 3 dimensions, not 4 (b h s d)",
        ),
        (sdpa(QKV.replace("%k: f32[batch", "%k: f32[1")), "k is 1 at b, expected batch"),
        (sdpa(QKV.replace("%v: f32[batch, 4", "%v: f32[batch, 1")), "v is 1 at n, expected 4"),
    ],
)
def test_sdpa_refuses(body: str, reason: str) -> None:
    assert_refuses(body, FuseSdpa(), reason)


def test_a_dynamic_head_size_with_a_scale_fires() -> None:
    applied = apply(sdpa(DYNAMIC, ", scale=0.25"), FuseSdpa())
    assert applied.text == program(attention(DYNAMIC, "scale=0.25"))


# Grouped heads


def repeated(name: str, width: int, groups: int = 2) -> str:
    heads, split = 2 * groups, f"batch, 2, {groups}, keys, {width}"
    return f"""
        %{name}u: f32[batch, 2, 1, keys, {width}] = aten.unsqueeze.default(self=%{name}, dim=2)
        %{name}e: f32[{split}] = aten.expand.default(self=%{name}u, size=[{split}])
        %{name}r: f32[batch, {heads}, keys, {width}] = aten.reshape.default(self=%{name}e, shape=[batch, {heads}, keys, {width}])
    """


def grouped(*args: str, head: str = GROUPED, k: str = repeated("k", 8), v: str = repeated("v", 6)) -> str:
    return attention(head + k + v, *args).replace("k=%k,", "k=%kr,").replace("v=%v,", "v=%vr,")


@pytest.mark.parametrize(
    "args", [("scale=1.0",), ("scale=0.5", 'causal="lower_right"', "window_left=2", "softcap=5.0")]
)
def test_grouped_heads_fire_and_are_equal(args: tuple[str, ...]) -> None:
    assert_attends(grouped(*args), FoldRepeatKv(), GROUPED, *args)


def test_grouped_heads_with_masks_fire() -> None:
    head = f"{GROUPED}input %bias: f32[batch, 1, sequence, keys]\ninput %mask: bool[batch, keys]\n"
    args = ("bias=%bias", "key_mask=%mask", "scale=1.0")
    assert_attends(grouped(*args, head=head), FoldRepeatKv(), head, *args)


def test_grouped_heads_refuse_values_that_escape() -> None:
    body = grouped("scale=1.0") + "\noutput z = %kr"
    assert_refuses(body, FoldRepeatKv(), "%kr (aten.reshape.default) is also used by an output")


def wrongly_repeated(name: str, width: int) -> str:
    """Heads repeated by an axis before them: 0 1 0 1 instead of 0 0 1 1."""
    return f"""
        %{name}u: f32[batch, 1, 2, keys, {width}] = aten.unsqueeze.default(self=%{name}, dim=1)
        %{name}e: f32[batch, 2, 2, keys, {width}] = aten.expand.default(self=%{name}u, size=[batch, 2, 2, keys, {width}])
        %{name}r: f32[batch, 4, keys, {width}] = aten.reshape.default(self=%{name}e, shape=[batch, 4, keys, {width}])
    """


def test_heads_that_are_repeated_in_another_order_do_not_match() -> None:
    body = grouped("scale=1.0", k=wrongly_repeated("k", 8), v=wrongly_repeated("v", 6))
    assert_not_matched(body, FoldRepeatKv())


SIX = f"""{DIMS}
    dim keys in [1, ...]
    input %q: f32[2, 4, sequence, 8]
    input %k: f32[2, 2, keys, 8]
    input %v: f32[2, 2, keys, 6]
    input %n: f32[batch]
"""


def expanded_to_six_axes(name: str, width: int) -> str:
    return f"""
        %{name}u: f32[2, 2, 1, keys, {width}] = aten.unsqueeze.default(self=%{name}, dim=2)
        %{name}e: f32[1, 2, 2, 2, keys, {width}] = aten.expand.default(self=%{name}u, size=[1, 2, 2, 2, keys, {width}])
        %{name}r: f32[2, 4, keys, {width}] = aten.reshape.default(self=%{name}e, shape=[2, 4, keys, {width}])
    """


def regrouped(name: str, width: int) -> str:
    """The new axis is merged with the keys."""
    return f"""
        %{name}u: f32[2, 2, 1, 6, {width}] = aten.unsqueeze.default(self=%{name}, dim=2)
        %{name}e: f32[2, 2, 2, 6, {width}] = aten.expand.default(self=%{name}u, size=[2, 2, 2, 6, {width}])
        %{name}r: f32[2, 2, 12, {width}] = aten.reshape.default(self=%{name}e, shape=[2, 2, 12, {width}])
    """


def test_grouped_heads_refuse_other_expansions() -> None:
    six = grouped("scale=1.0", head=SIX, k=expanded_to_six_axes("k", 8), v=expanded_to_six_axes("v", 6))
    six = six.replace("%o: f32[batch", "%o: f32[2")
    assert_refuses(six, FoldRepeatKv(), "the heads are not repeated by one new axis")


def test_grouped_heads_refuse_repeated_keys() -> None:
    head = SIX.replace("keys, 8]", "6, 8]").replace("keys, 6]", "6, 6]").replace("dim keys in [1, ...]", "")
    body = grouped("scale=1.0", head=head, k=regrouped("k", 8), v=regrouped("v", 6))
    body = body.replace("%o: f32[batch", "%o: f32[2")
    assert_refuses(body, FoldRepeatKv(), "the repeated heads are not merged with the heads")


def test_grouped_heads_refuse_keys_and_values_that_differ() -> None:
    head = GROUPED.replace("%v: f32[batch, 2", "%v: f32[batch, 1")
    v = repeated("v", 6, 4).replace("batch, 2,", "batch, 1,").replace("batch, 8,", "batch, 4,")
    body = grouped("scale=1.0", head=head, v=v)
    assert_refuses(body, FoldRepeatKv(), "v is 1 at n, expected 2")


# Masks


POSITIONS = lines(
    "i = arange.start_step(start=0, end=sequence, dtype=i64)",
    "j = arange.start_step(start=0, end=keys, dtype=i64)",
    "c = unsqueeze.default(self=%i, dim=1)",
    "distance = sub.Tensor(self=%c, other=%j)",
    "causal = ge.Scalar(self=%distance, other=0)",
    "near = le.Scalar(self=%distance, other=2)",
    "ahead = ge.Scalar(self=%distance, other=-1)",
    "band = bitwise_and.Tensor(self=%near, other=%ahead)",
    "ci = floor_divide.default(self=%c, other=3)",
    "cj = floor_divide.default(self=%j, other=3)",
    "chunk = eq.Tensor(self=%ci, other=%cj)",
    "early = lt.Scalar(self=%j, other=3)",
)
PAD = "pad = to.dtype(self=%mask, dtype=bool)"
PADDING = lines(
    PAD,
    "pad3 = unsqueeze.default(self=%pad, dim=1)",
    "padding = unsqueeze.default(self=%pad3, dim=2)",
    "both = bitwise_and.Tensor(self=%causal, other=%padding)",
    "zero = full.default(size=[], fill_value=0.0, dtype=f32)",
    "added = where.ScalarOther(condition=%both, self=%zero, other=-inf)",
    "prefixed = bitwise_or.Tensor(self=%causal, other=%padding)",
)
MASK = f"{QKV}input %mask: i64[batch, keys]\n"
MASKED = MASK + POSITIONS + PADDING
UPPER, LOWER, ONE = 'causal="upper_left"', 'causal="lower_right"', "scale=1.0"


def of(*made: str, head: str = MASK) -> str:
    """What a proof leaves of a mask's graph."""
    return head + lines(*made)


# Masks in parts


RELATIVE = f"""{QKV}
    input %relative: f32[batch, 4, sequence, keys]
    input %mask: bool[batch, keys]
    input %mask_seen: bool[batch, 1, sequence, keys]
"""
SHOWN = (
    "mask3 = unsqueeze.default(self=%mask, dim=1)",
    "shown = unsqueeze.default(self=%mask3, dim=1)",
    "zero = full.default(size=[], fill_value=0.0, dtype=f32)",
    "low = where.ScalarOther(condition=%shown, self=%zero, other=-3.4028234663852886e+38)",
)


def parts(*made: str) -> str:
    """A graph whose bias is the last of some lines."""
    return attention(of(*made, head=RELATIVE), f"bias=%{made[-1].split(' ', maxsplit=1)[0]}", ONE)


# The pass


def spelled(*calls: str, head: str = QKV, scores: str = "s") -> str:
    """Attention as products and a softmax, with ``calls`` between its scores ``%s`` and the softmax."""
    return f"""{head}
        %t = aten.transpose.int(self=%k, dim0=2, dim1=3)
        %s = aten.matmul.default(self=%q, other=%t)
        {lines(*calls)}
        %w = aten.softmax.int(self=%{scores}, dim=3)
        %o = aten.matmul.default(self=%w, other=%v)
        output y = %o"""


MASKED_SDPA = sdpa(MASKED, ", attn_mask=%both")
UNPROVEN_SDPA = sdpa(MASKED + lines("unproven = gt.Scalar(self=%distance, other=0)"), ", attn_mask=%unproven")
ROTATED = f"""{DIMS}
    input %x: f32[batch, 4, sequence, 8]
    input %cos: f32[1, sequence, 4]
    input %sin: f32[1, sequence, 4]
""" + lines(
    "a, %b = split_with_sizes.default(self=%x, split_sizes=[4, 4], dim=3)",
    "ac = mul.Tensor(self=%a, other=%cos)",
    "bs = mul.Tensor(self=%b, other=%sin)",
    "l = sub.Tensor(self=%ac, other=%bs)",
    "bc = mul.Tensor(self=%b, other=%cos)",
    "as = mul.Tensor(self=%a, other=%sin)",
    "r = add.Tensor(self=%bc, other=%as)",
    "o = cat.default(tensors=[%l, %r], dim=3)",
) + "output y = %o"  # fmt: skip


def test_the_pass_fuses_and_proves() -> None:
    applied = apply_pass(MASKED_SDPA, FuseAttention())
    assert applied.text == program(attention(of(PAD), "key_mask=%pad", DEFAULT, UPPER))
    assert applied.matches == {"FuseSdpa": 1, "ProveMask": 1}
    assert_equal_runs(program(MASKED_SDPA), applied.text)


def test_without_prove_masks_a_mask_stays_a_bias() -> None:
    applied = apply_pass(sdpa(MASKED, ", attn_mask=%causal"), FuseAttention(prove_masks=False))
    assert "bias=%causal" in applied.text
    assert applied.matches == {"FuseSdpa": 1}
    assert applied.reasons == []


def test_without_rotary_it_stays_apart() -> None:
    with pytest.raises(NoMatchError):
        apply_pass(ROTATED, FuseAttention(rotary=False))
    assert apply_pass(ROTATED, FuseAttention()).matches == {"FusePairs": 1}


def test_grouped_heads_of_the_spelled_attention() -> None:
    body = spelled(head=GROUPED + repeated("k", 8) + repeated("v", 6)).replace("self=%k, dim0", "self=%kr, dim0")
    body = body.replace("other=%v)", "other=%vr)")
    applied = apply_pass(body, FuseAttention())
    assert applied.text == program(attention(GROUPED, ONE))
    assert applied.matches == {"FuseSpelledAttention": 1, "MergePermutations": 1, "FoldRepeatKv": 1}
    assert_equal_runs(program(body), applied.text)


@pytest.mark.parametrize(
    "body",
    [
        MASKED_SDPA,
        UNPROVEN_SDPA,
        spelled(),
        grouped(ONE),
        ROTATED,
        parts(*SHOWN, "b = add.Tensor(self=%relative, other=%low)"),
    ],
)
def test_idempotent(body: str) -> None:
    assert_idempotent(body, FuseAttention())


def test_rules_of_the_pass() -> None:
    first = [ProductOfEinsum, FuseSdpa, FuseSpelledAttention, *(type(rule) for rule in MOVES), FoldRepeatKv]
    rotary = [type(rule) for rule in ROTARY]
    assert [type(rule) for rule in FuseAttention().rules()] == [*first, *rotary, ProveMask]
    assert [type(rule) for rule in FuseAttention(rotary=False, prove_masks=False).rules()] == first


def test_nothing_to_fuse_is_an_error_with_its_reason() -> None:
    with pytest.raises(NoMatchError, match=r"fuse_attention changed nothing \(FuseSdpa: it has dropout\)"):
        apply_pass(sdpa(args=", dropout_p=0.5"), FuseAttention())


def test_the_report_holds_the_refusal() -> None:
    applied = apply_pass(UNPROVEN_SDPA, FuseAttention())
    assert applied.matches == {"FuseSdpa": 1}
    assert applied.reasons == [
        "the mask %unproven stays a bias: it holds a condition that is no known structure: k - q <= -1"
    ]


def test_the_report_says_why_an_attention_does_not_match() -> None:
    applied = apply_pass(spelled("n = neg.default(self=%s)", scores="n"), FuseAttention(allow_no_match=True))
    assert applied.matches == {}
    (reason,) = applied.reasons
    assert reason.startswith("expected aten.matmul or aten.bmm or aten.baddbmm or aten.mul or ")
    assert reason.endswith(", not %n, aten.neg.default")


def test_a_refused_attention_is_reported_once() -> None:
    body = spelled("m = div.Tensor(self=%s, other=0.0)", scores="m")
    applied = apply_pass(body, FuseAttention(allow_no_match=True))
    assert applied.reasons == ["the scores are divided by zero"]


def test_options_are_checked() -> None:
    unknown: dict[str, Any] = {"rotery": False}
    with pytest.raises(ValueError, match="rotery"):
        FuseAttention(**unknown)
