"""fuse_attention: the framework's own op, grouped heads, proven masks, what the pass reports; and where graphs attend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from graphopt import attentions
from graphopt.errors import NoMatchError
from graphopt.execution import run
from graphopt.ir import Graph
from graphopt.passes.einsum import ProductOfEinsum
from graphopt.passes.fuse_attention import FoldRepeatKv, FuseAttention, FuseSdpa, ProveMask
from graphopt.passes.moves import MOVES
from graphopt.passes.rotary import ROTARY
from graphopt.passes.spelled_attention import FuseSpelledAttention
from graphopt.pipeline import run_passes
from graphopt.rewrite import Rule
from graphopt.schemas.report import RefusalReport
from tests.rules import (
    DIMS,
    GROUPED,
    QKV,
    SIZES,
    SQUARE,
    Case,
    apply,
    apply_pass,
    assert_becomes,
    assert_close,
    assert_equal,
    assert_equal_runs,
    assert_fires,
    assert_idempotent,
    assert_keeps,
    assert_not_matched,
    assert_refuses,
    attention,
    inputs_of,
    lines,
    mended,
    program,
    read,
    traced,
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
        (sdpa(QKV.replace("batch, 4, keys", "batch, 1, keys")), "q and k differ in heads without enable_gqa"),
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


def with_mask(bias: str, *args: str, head: str = MASKED, made: str = "") -> str:
    return attention(head + made, f"bias=%{bias}", ONE, *args)


def of(*made: str, head: str = MASK) -> str:
    """What a proof leaves of a mask's graph."""
    return head + lines(*made)


EARLY = (
    "places = arange.start_step(start=0, end=keys, dtype=i64)",
    "first = lt.Scalar(self=%places, other=3)",
    "row = reshape.default(self=%first, shape=[1, keys])",
    "rows = expand.default(self=%row, size=[batch, keys])",
)


@pytest.mark.parametrize(
    ("body", "after"),
    [
        (with_mask("causal"), attention(MASK, ONE, UPPER)),
        (with_mask("near"), attention(MASK, ONE, "window_left=2")),
        (with_mask("band"), attention(MASK, ONE, "window_left=2", "window_right=1")),
        (with_mask("padding"), attention(of(PAD), "key_mask=%pad", ONE)),
        (with_mask("both"), attention(of(PAD), "key_mask=%pad", ONE, UPPER)),
        (with_mask("added"), attention(of(PAD), "key_mask=%pad", ONE, UPPER)),
        (with_mask("chunk"), attention(MASK, ONE, "chunk=3")),
        (
            with_mask("b", made=lines("b = bitwise_and.Tensor(self=%chunk, other=%causal)")),
            attention(MASK, ONE, UPPER, "chunk=3"),
        ),
        (with_mask("prefixed"), attention(of(PAD), "prefix=%pad", ONE, UPPER)),
        (
            with_mask("b", made=lines("b = bitwise_or.Tensor(self=%causal, other=%early)")),
            attention(of(*EARLY), "prefix=%rows", ONE, UPPER),
        ),
        (
            with_mask(
                "b",
                made=lines(
                    "cn = bitwise_and.Tensor(self=%causal, other=%near)",
                    "b = bitwise_or.Tensor(self=%cn, other=%padding)",
                ),
            ),
            attention(of(PAD), "prefix=%pad", ONE, UPPER, "window_left=2"),
        ),
        # with what an attention says already
        (with_mask("padding", LOWER), attention(of(PAD), "key_mask=%pad", ONE, LOWER)),
        (with_mask("padding", "window_left=3"), attention(of(PAD), "key_mask=%pad", ONE, "window_left=3")),
        (with_mask("padding", "chunk=2"), attention(of(PAD), "key_mask=%pad", ONE, "chunk=2")),
        (with_mask("near", UPPER), attention(MASK, ONE, UPPER, "window_left=2")),
        (with_mask("chunk", UPPER), attention(MASK, ONE, UPPER, "chunk=3")),
        (with_mask("causal", "softcap=5.0"), attention(MASK, ONE, UPPER, "softcap=5.0")),
    ],
)
def test_a_mask_is_proven_and_equal(body: str, after: str) -> None:
    sizes = [size for size in SIZES if size["keys"] <= size["sequence"]] if "window" in after else SIZES
    assert_becomes(body, after, [ProveMask()], sizes)


GIVEN_MASK = f"{QKV}input %mask: bool[batch, keys]\ninput %seen: bool[batch, keys]\n"
ROW = "pad3 = unsqueeze.default(self=%mask, dim=1)", "bias = unsqueeze.default(self=%pad3, dim=1)"


@pytest.mark.parametrize(
    ("known", "made", "args"),
    [
        ("key_mask=%seen", ["m = bitwise_and.Tensor(self=%seen, other=%mask)"], ("key_mask=%m", ONE)),
        ("prefix=%seen", [], ("key_mask=%mask", "prefix=%seen", ONE)),
    ],
)
def test_a_key_mask_joins_what_is_there(known: str, made: list[str], args: tuple[str, ...]) -> None:
    causal = (UPPER,) if "prefix" in known else ()
    body = attention(of(*ROW, head=GIVEN_MASK), "bias=%bias", known, ONE, *causal)
    assert_becomes(body, attention(of(*made, head=GIVEN_MASK), *args, *causal), [ProveMask()])


@pytest.mark.parametrize(
    ("mask", "row"),
    [
        ("bool[1, keys]", ["rows = expand.default(self=%mask, size=[batch, keys])"]),
        (
            "bool[keys]",
            [
                "row = reshape.default(self=%mask, shape=[1, keys])",
                "rows = expand.default(self=%row, size=[batch, keys])",
            ],
        ),
        ("bool[batch, 1, 1, keys]", ["rows = reshape.default(self=%mask, shape=[batch, keys])"]),
    ],
)
def test_a_key_mask_of_any_shape_becomes_rows(mask: str, row: list[str]) -> None:
    head = f"{QKV}input %mask: {mask}\n"
    after = attention(of(*row, head=head), "key_mask=%rows", ONE)
    assert_becomes(attention(head, "bias=%mask", ONE), after, [ProveMask()])


def test_a_key_mask_may_say_what_is_hidden() -> None:
    head = f"{QKV}input %mask: i64[batch, 1, 1, keys]\n"
    made = ["row = reshape.default(self=%mask, shape=[batch, keys])", "shown = eq.Scalar(self=%row, other=0)"]
    after = attention(of(*made, head=head), "key_mask=%shown", ONE)
    body = attention(of("bias = eq.Scalar(self=%mask, other=0)", head=head), "bias=%bias", ONE)
    assert_becomes(body, after, [ProveMask()], SIZES[:2])


PACKED = f"{SQUARE}input %numbers: i64[batch, sequence]\n"
OWN = (
    "r = unsqueeze.default(self=%numbers, dim=1)",
    "q1 = unsqueeze.default(self=%numbers, dim=2)",
    "own3 = eq.Tensor(self=%r, other=%q1)",
    "own = unsqueeze.default(self=%own3, dim=1)",
)
OWN_CAUSAL = (
    *OWN,
    "i = arange.start_step(start=0, end=sequence, dtype=i64)",
    "c = unsqueeze.default(self=%i, dim=1)",
    "causal = le.Tensor(self=%i, other=%c)",
    "bias = bitwise_and.Tensor(self=%own, other=%causal)",
)


@pytest.mark.parametrize(
    ("made", "args"),
    [(OWN, ("segments=%numbers", ONE)), (OWN_CAUSAL, ("segments=%numbers", ONE, UPPER))],
)
def test_segments_are_proven(made: tuple[str, ...], args: tuple[str, ...]) -> None:
    body = attention(of(*made, head=PACKED), f"bias=%{made[-1].split(' ', maxsplit=1)[0]}", ONE)
    assert_becomes(body, attention(PACKED, *args), [ProveMask()])


def test_attentions_of_one_mask_share_its_truths() -> None:
    made = (
        "on = ne.Scalar(self=%mask, other=0)",
        "on3 = unsqueeze.default(self=%on, dim=1)",
        "bias = unsqueeze.default(self=%on3, dim=1)",
    )
    calls = "{}%p = graphopt.attention.default(q=%q, k=%k, v=%v, {}, scale=2.0)\n"
    body = attention(calls.format(of(*made), "bias=%bias"), "bias=%bias", ONE) + "\noutput p = %p"
    truths = of("to = to.dtype(self=%mask, dtype=bool)")
    after = attention(calls.format(truths, "key_mask=%to"), "key_mask=%to", ONE) + "\noutput p = %p"
    applied = apply(body, ProveMask())
    assert applied.text == program(after)
    assert_equal_runs(program(body), applied.text)


def test_the_mask_that_was_given_is_the_key_mask() -> None:
    made = (
        "m3 = unsqueeze.default(self=%mask, dim=1)",
        "m4 = unsqueeze.default(self=%m3, dim=1)",
        "hidden = bitwise_not.default(self=%m4)",
        "bias = bitwise_not.default(self=%hidden)",
    )
    body = attention(of(*made, head=GIVEN_MASK), "bias=%bias", ONE)
    assert_becomes(body, attention(GIVEN_MASK, "key_mask=%mask", ONE), [ProveMask()])


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
CAUSAL = (
    "i = arange.start_step(start=0, end=sequence, dtype=i64)",
    "j = arange.start_step(start=0, end=keys, dtype=i64)",
    "c = unsqueeze.default(self=%i, dim=1)",
    "causal = le.Tensor(self=%j, other=%c)",
)
HIDE_LATER = "b = where.ScalarOther(condition=%causal, self=%s, other=-inf)"
SEEN_TOO = "d = bitwise_and.Tensor(self=%causal, other=%mask_seen)"
STAYS = "the mask %relative stays a bias: it adds values that are neither 0 nor -inf"


def parts(*made: str) -> str:
    """A graph whose bias is the last of some lines."""
    return attention(of(*made, head=RELATIVE), f"bias=%{made[-1].split(' ', maxsplit=1)[0]}", ONE)


@pytest.mark.parametrize(
    ("made", "args", "reason"),
    [
        ((*SHOWN, "b = add.Tensor(self=%relative, other=%low)"), ("bias=%relative", "key_mask=%mask", ONE), STAYS),
        ((*SHOWN, "b = add.Tensor(self=%low, other=%relative)"), ("bias=%relative", "key_mask=%mask", ONE), STAYS),
        (
            (*CAUSAL, "b = where.ScalarOther(condition=%causal, self=%relative, other=-inf)"),
            ("bias=%relative", ONE, UPPER),
            STAYS,
        ),
        (
            (*CAUSAL, "h = bitwise_not.default(self=%causal)", "b = masked_fill.Scalar(self=%relative, mask=%h, value=-10000.0)"),
            ("bias=%relative", ONE, UPPER),
            STAYS,
        ),
        (
            (*SHOWN, *CAUSAL, "s = add.Tensor(self=%relative, other=%low)", HIDE_LATER),
            ("bias=%relative", "key_mask=%mask", ONE, UPPER),
            STAYS,
        ),
        (
            (*CAUSAL, "b = bitwise_and.Tensor(self=%mask_seen, other=%causal)"),
            ("bias=%mask_seen", ONE, UPPER),
            "the mask %mask_seen stays a bias: it holds a condition that is no known structure: %mask_seen[b, 0, q, k]",
        ),
        (
            (*SHOWN[:2], *CAUSAL, SEEN_TOO, "b = bitwise_and.Tensor(self=%shown, other=%d)"),
            ("bias=%mask_seen", "key_mask=%mask", ONE, UPPER),
            "the mask %mask_seen stays a bias: it holds a condition that is no known structure: %mask_seen[b, 0, q, k]",
        ),
    ],
)  # fmt: skip
def test_what_is_proven_of_a_mask_leaves_the_rest(made: tuple[str, ...], args: tuple[str, ...], reason: str) -> None:
    assert_becomes(parts(*made), attention(RELATIVE, *args), [ProveMask()], reasons=[reason])


def test_what_is_left_of_a_mask_is_one_bias() -> None:
    """Two summands and a truth that are not proven, between them one that is."""
    made = (
        *CAUSAL,
        "s = add.Tensor(self=%relative, other=%relative)",
        "t = where.ScalarOther(condition=%causal, self=%s, other=-inf)",
        "b = where.ScalarOther(condition=%mask_seen, self=%t, other=-inf)",
    )
    left = (
        "sum = add.Tensor(self=%relative, other=%relative)",
        "bias = where.ScalarOther(condition=%mask_seen, self=%sum, other=-3.4028234663852886e+38)",
    )
    stays = "the mask %where stays a bias: arithmetic on values that are not positions or constants"
    after = attention(of(*left, head=RELATIVE), "bias=%bias", ONE, UPPER)
    assert_becomes(parts(*made), after, [ProveMask()], reasons=[stays])


# Masks that stay


LONGER = f"{QKV}input %mask: bool[batch, keys + 2]\n"
LONGER_MADE = (
    "part = slice.Tensor(self=%mask, dim=1, start=0, end=keys)",
    "p3 = unsqueeze.default(self=%part, dim=1)",
    "bias = unsqueeze.default(self=%p3, dim=1)",
)
PREFIX_GIVEN = f"{MASK}input %first: bool[batch, keys]\n{POSITIONS}{PADDING}"
NUMBERED = f"{PACKED}input %others: i64[batch, sequence]\n"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            with_mask("bias", head=f"{QKV}input %bias: f32[batch, 1, sequence, keys]\n"),
            "the mask %bias stays a bias: it adds values that are neither 0 nor -inf",
        ),
        (
            with_mask("b", made=lines("b = gt.Scalar(self=%distance, other=0)")),
            "the mask %b stays a bias: it holds a condition that is no known structure: k - q <= -1",
        ),
        (with_mask("causal", UPPER), "it is causal twice"),
        (with_mask("causal", LOWER), "it is causal twice"),
        (with_mask("prefixed", UPPER), "it is causal twice"),
        (with_mask("near", "window_left=3"), "it has a window already"),
        (with_mask("near", "window_right=3"), "it has a window already"),
        (with_mask("causal", "window_right=3"), "it has a window already"),
        (with_mask("chunk", "chunk=3"), "it has a prefix or chunks already"),
        (with_mask("causal", "chunk=3"), "it has a prefix or chunks already"),
        (attention(PREFIX_GIVEN, "bias=%near", "prefix=%first", ONE, UPPER), "it has a prefix or chunks already"),
        (with_mask("near", LOWER), "its window counts from the upper left, its causal part from the lower right"),
        (with_mask("chunk", LOWER), "its window counts from the upper left, its causal part from the lower right"),
        (attention(of(*OWN, head=NUMBERED), "bias=%own", "segments=%others", ONE), "it has segments already"),
    ],
)
def test_a_mask_stays(body: str, reason: str) -> None:
    assert_refuses(body, ProveMask(), reason)


def test_a_window_from_the_upper_left_joins_a_causal_part_where_keys_are_as_many() -> None:
    made = lines(
        "i = arange.start_step(start=0, end=sequence, dtype=i64)",
        "c = unsqueeze.default(self=%i, dim=1)",
        "distance = sub.Tensor(self=%c, other=%i)",
        "near = le.Scalar(self=%distance, other=2)",
    )
    body = attention(SQUARE + made, "bias=%near", ONE, LOWER)
    assert_becomes(body, attention(SQUARE, ONE, LOWER, "window_left=2"), [ProveMask()])


def test_a_mask_of_attention_with_heads_last_counts_positions() -> None:
    head = f"{DIMS}input %q: f32[batch, sequence, 4, 8]\n"
    made = lines(
        "i = arange.start_step(start=0, end=sequence, dtype=i64)",
        "c = unsqueeze.default(self=%i, dim=1)",
        "causal = le.Tensor(self=%i, other=%c)",
    )
    own = {"qkv": "q=%q, k=%q, v=%q"}
    body = attention(head + made, "bias=%causal", ONE, "heads_last=True", **own)
    assert_becomes(body, attention(head, ONE, UPPER, "heads_last=True", **own), [ProveMask()])


WIDE_SIZES = [{"batch": 2, "sequence": 6, "keys": 6}, {"batch": 3, "sequence": 7, "keys": 5}]


def joined(*made: str, head: str = GIVEN_MASK) -> str:
    first = ("mask3 = unsqueeze.default(self=%mask, dim=1)", "pad = unsqueeze.default(self=%mask3, dim=1)")
    names = POSITIONS + lines(*first)
    return attention(head + names + lines(*made), f"bias=%{made[-1].split(' ', maxsplit=1)[0]}", ONE)


COUNTED = f"{QKV}input %numbers: i64[batch, 1, sequence, keys]\ninput %mask_seen: bool[batch, 1, sequence, keys]\n"


@pytest.mark.parametrize(
    "body",
    [
        joined("p = bitwise_or.Tensor(self=%causal, other=%pad)", "b = bitwise_and.Tensor(self=%p, other=%near)"),
        joined("p = bitwise_or.Tensor(self=%causal, other=%pad)", "b = bitwise_and.Tensor(self=%near, other=%p)"),
        joined("p = bitwise_or.Tensor(self=%causal, other=%ahead)", "b = bitwise_or.Tensor(self=%p, other=%pad)"),
        joined("p = bitwise_or.Tensor(self=%causal, other=%pad)", "b = bitwise_and.Tensor(self=%p, other=%chunk)"),
        attention(of(*LONGER_MADE, head=LONGER), "bias=%bias", ONE),
    ],
    ids=["prefix, window", "window, prefix", "two bounds or a prefix", "prefix, chunks", "part of a longer mask"],
)
def test_masks_near_known_ones_are_equal(body: str) -> None:
    """A window beside a prefix is not under it; one of two bounds is not both."""
    assert_keeps(body, ProveMask(), sizes=WIDE_SIZES)


@pytest.mark.parametrize(
    "body",
    [
        mended(
            "a truth that is added to a mask adds one and hides nothing",
            joined(
                "z = full.default(size=[], fill_value=0.0, dtype=f32)",
                "f = where.ScalarOther(condition=%causal, self=%z, other=-inf)",
                "b = add.Tensor(self=%f, other=%pad)",
            ),
        ),
        mended(
            "a truth that is filled with a low is a number",
            joined("b = where.ScalarOther(condition=%causal, self=%pad, other=-1000000000.0)"),
        ),
        mended(
            "a low that is filled into truths is true",
            joined(
                "n = bitwise_not.default(self=%causal)",
                "p = bitwise_and.Tensor(self=%pad, other=%causal)",
                "b = masked_fill.Scalar(self=%p, mask=%n, value=-1000000000.0)",
            ),
        ),
        mended(
            "integers that are left of a mask (TypeError)",
            attention(
                of("b = where.ScalarOther(condition=%mask_seen, self=%numbers, other=-inf)", head=COUNTED),
                "bias=%b",
                ONE,
            ),
        ),
    ],
)
def test_masks_that_are_not_understood_stay(body: str) -> None:
    assert_keeps(body, ProveMask(), sizes=WIDE_SIZES)


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


# Where a graph attends


def found(body: str) -> tuple[list[str], list[str]]:
    """The attentions of a graph that are one op, and those that are not, by name."""
    graph = read(body)
    return tuple([node.output.name for node in nodes] for nodes in (attentions.fused(graph), attentions.unfused(graph)))  # type: ignore[return-value]


def softmax_of(scores: str, use: str) -> str:
    """A softmax over scores that no product of activations makes, and what its weights are used for."""
    return f"""{DIMS}
        input %x: f32[batch, sequence, 8]
        input %experts: f32[batch, 3, 8]
        weight %router: f32[3, 8]
        weight %pool: f32[1, 8]
        {lines(scores)}
        %w = aten.softmax.int(self=%s, dim={1 if "pool" in scores else 2})
        {lines(use)}
        output y = %o"""


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (sdpa(), ([], ["o"])),
        (spelled(), ([], ["w"])),
        (spelled("m = mul.Tensor(self=%s, other=0.5)", "n = neg.default(self=%m)", scores="n"), ([], ["w"])),
        (attention(QKV, ONE), (["o"], [])),
        (
            softmax_of("s = linear.default(input=%x, weight=%router)", "o = matmul.default(self=%w, other=%experts)"),
            ([], []),
        ),
        (softmax_of("s = linear.default(input=%x, weight=%pool)", "o = mul.Tensor(self=%w, other=%x)"), ([], [])),
        (spelled().replace("aten.matmul.default(self=%w, other=%v)", "aten.relu.default(self=%w)"), ([], [])),
        (spelled().replace("softmax", "log_softmax"), ([], [])),
    ],
)
def test_attention_is_a_softmax_between_two_products(body: str, expected: tuple[list[str], list[str]]) -> None:
    """A router's softmax weighs values by scores of a linear; a pooling one weighs by a multiplication and a sum."""
    assert found(body) == expected


def test_weights_go_into_products_through_moves() -> None:
    body = (
        spelled(head=SQUARE)
        .replace("self=%w, other=%v", "self=%d, other=%v")
        .replace(
            "%o =", "%c = aten.clone.default(self=%w)\n%d = aten.dropout.default(input=%c, p=0.5, train=True)\n%o ="
        )
    )
    graph = read(body)
    (softmax,) = attentions.unfused(graph)
    assert [node.output.name for node in attentions.weighed(softmax)] == ["o"]
    (node,) = attentions.unfused(read(sdpa()))
    assert attentions.weighed(node) == [node]


def test_weights_may_go_into_several_products() -> None:
    body = spelled() + "\noutput z = %z"
    graph = read(body.replace("output y", "%z = aten.matmul.default(self=%w, other=%k)\noutput y"))
    (softmax,) = attentions.unfused(graph)
    assert {node.output.name for node in attentions.weighed(softmax)} == {"o", "z"}


def refusals(graph: Graph) -> list[RefusalReport]:
    (report,) = run_passes(graph, [FuseAttention(allow_no_match=True)])
    return list(report.refusals)


def test_the_table_describes_an_attention() -> None:
    head = GROUPED + "input %sinks: f32[4]\n" + POSITIONS + lines("b = bitwise_and.Tensor(self=%causal, other=%near)")
    graph = read(attention(head, "bias=%b", "sinks=%sinks", ONE, "softcap=5.0"))
    (row,) = attentions.table(graph, refusals(graph))
    assert row.fused
    assert (row.heads, row.kv_heads, row.size, row.value_size) == ("4", "2", "8", "6")
    assert (row.queries, row.keys, row.mask) == ("sequence", "keys", "causal, window left 2")
    assert (row.extras, row.unproven, row.refusal, row.name) == (["softcap", "sinks"], "", "", "o")


@pytest.mark.parametrize(
    ("head", "args", "mask"),
    [
        (QKV, (), "none"),
        (QKV, (UPPER,), "causal"),
        (QKV, (LOWER, "window_left=3", "window_right=2"), "causal (lower right), window left 3, window right 2"),
        (QKV, ("chunk=4",), "chunks of 4"),
        (GIVEN_MASK, ("key_mask=%mask", "prefix=%seen", UPPER), "causal, prefix, key padding"),
        (PACKED, ("segments=%numbers",), "segments"),
        (f"{QKV}input %bias: f32[1]\n", ("bias=%bias",), "bias"),
        (f"{QKV}input %lengths: i64[batch]\n", ("kv_lengths=%lengths",), "key lengths"),
    ],
)
def test_the_table_describes_masks(head: str, args: tuple[str, ...], mask: str) -> None:
    named = sorted(args, key=lambda arg: "%" not in arg)
    graph = read(attention(head, *(arg for arg in named if "%" in arg), ONE, *(arg for arg in named if "%" not in arg)))
    (row,) = attentions.table(graph, [])
    assert row.mask == mask


def test_the_table_of_heads_last_names_the_same_sizes() -> None:
    body = """
        dim batch in [1, ...]
        dim sequence in [1, ...]
        dim keys in [1, ...]
        input %q: f32[batch, sequence, 4, 8]
        input %k: f32[batch, keys, 2, 8]
        input %v: f32[batch, keys, 2, 6]"""
    (row,) = attentions.table(read(attention(body, ONE, "heads_last=True")), [])
    assert (row.heads, row.kv_heads, row.queries, row.keys) == ("4", "2", "sequence", "keys")


def test_the_table_says_what_is_not_one_op_and_why() -> None:
    graph = read(spelled("n = neg.default(self=%s)", scores="n"))
    (row,) = attentions.table(graph, [])
    assert (row.name, row.fused, row.refusal) == ("o", False, "fuse_attention was not run")
    (row,) = attentions.table(graph, refusals(graph))
    assert row.refusal.endswith("not %n, aten.neg.default")
    graph = read(UNPROVEN_SDPA)
    (row,) = attentions.table(graph, refusals(graph))
    assert (row.mask, row.unproven.startswith("the mask %unproven stays a bias")) == ("bias", True)


def test_a_table_of_several_attentions_is_in_their_order() -> None:
    first = "%p = graphopt.attention.default(q=%q, k=%k, v=%v, scale=2.0)\n"
    graph = read(sdpa(QKV + first, ", dropout_p=0.1") + "\noutput p = %p")
    rows = attentions.table(graph, refusals(graph))
    assert [(row.name, row.refusal) for row in rows] == [("p", ""), ("o", "it has dropout")]


class Pooling(nn.Module):
    """A weighted mean of tokens, and one of experts' results: softmaxes that attend to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.router = nn.Linear(8, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        pooled = (functional.softmax(self.score(x), 1) * x).sum(1)
        chosen = functional.softmax(self.router(pooled), -1)
        return (chosen[..., None] * torch.stack([pooled, -pooled, 2 * pooled], 1)).sum(1)


def test_pooling_and_routing_are_no_attention() -> None:
    graph = traced(Pooling().eval().forward, {"x": "f32[batch, sequence, 8]"})
    assert sum(node.op.startswith("aten.softmax") for node in graph.nodes) == 2
    assert attentions.unfused(graph) == []


# What is still rewritten wrongly


LAST_GROUPED = """
    dim batch in [1, ...]
    input %q: f32[batch, 4, 2, 8]
    input %k: f32[batch, 3, 2, 8]
    input %v: f32[batch, 3, 2, 6]
    input %mask: bool[batch, 6]
"""


def repeated_keys(name: str, width: int) -> str:
    """The keys of heads-last attention, each twice."""
    return lines(
        f"{name}u = unsqueeze.default(self=%{name}, dim=2)",
        f"{name}e = expand.default(self=%{name}u, size=[batch, 3, 2, 2, {width}])",
        f"{name}r = reshape.default(self=%{name}e, shape=[batch, 6, 2, {width}])",
    )


TWICE = LAST_GROUPED + repeated_keys("k", 8) + repeated_keys("v", 6)
REPEATED = "q=%q, k=%kr, v=%vr"


@pytest.mark.parametrize(
    "body",
    [
        mended(
            "keys that are repeated are no grouped heads", attention(TWICE, ONE, UPPER, "heads_last=True", qkv=REPEATED)
        ),
        mended(
            "keys that are repeated, with their mask (cannot run)",
            attention(TWICE, "key_mask=%mask", ONE, "heads_last=True", qkv=REPEATED),
        ),
    ],
)
def test_repeated_keys_of_heads_last_stay(body: str) -> None:
    assert_keeps(body, FoldRepeatKv())


@pytest.mark.xfail(
    strict=True, reason="sdpa gives zeros for a row of -inf, attention gives NaN where the bias is floating"
)
def test_a_query_that_sees_no_key_gives_zeros() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        bias = torch.where(seen[:, None], 0.0, float("-inf"))
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    types = {"q": "f32[batch, 4, sequence, 8]", "k": "f32[batch, 4, keys, 8]", "v": "f32[batch, 4, keys, 6]"}
    graph = traced(attend, types | {"seen": "bool[batch, sequence, keys]"})
    run_passes(graph, [FuseAttention()])
    inputs = inputs_of(graph, SIZES[0])
    inputs["seen"][:, 0] = False
    assert_close(run(graph, inputs)["output"], attend(**inputs))
