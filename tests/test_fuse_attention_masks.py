"""fuse_attention: masks, whole and in parts, and those that stay."""

from __future__ import annotations

import pytest

from graphopt.passes.fuse_attention import ProveMask
from tests.rules import (
    DIMS,
    QKV,
    SIZES,
    SQUARE,
    apply,
    assert_becomes,
    assert_equal_runs,
    assert_keeps,
    assert_refuses,
    attention,
    lines,
    mended,
    program,
)
from tests.test_attention_reports import GIVEN_MASK, PACKED
from tests.test_fuse_attention import (
    LOWER,
    MASK,
    MASKED,
    ONE,
    PAD,
    PADDING,
    POSITIONS,
    RELATIVE,
    SHOWN,
    UPPER,
    of,
    parts,
)


def with_mask(bias: str, *args: str, head: str = MASKED, made: str = "") -> str:
    return attention(head + made, f"bias=%{bias}", ONE, *args)


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


CAUSAL = (
    "i = arange.start_step(start=0, end=sequence, dtype=i64)",
    "j = arange.start_step(start=0, end=keys, dtype=i64)",
    "c = unsqueeze.default(self=%i, dim=1)",
    "causal = le.Tensor(self=%j, other=%c)",
)
HIDE_LATER = "b = where.ScalarOther(condition=%causal, self=%s, other=-inf)"
SEEN_TOO = "d = bitwise_and.Tensor(self=%causal, other=%mask_seen)"
STAYS = "the mask %relative stays a bias: it adds values that are neither 0 nor -inf"


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
