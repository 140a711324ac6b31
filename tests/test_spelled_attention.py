"""FuseSpelledAttention: attention in any order of steps: scales, biases, masks, factors, sinks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from graphopt.passes.moves import MOVES
from graphopt.passes.spelled_attention import FuseSpelledAttention
from graphopt.rewrite import apply_rules
from graphopt.text import parse
from tests.rules import (
    QKV,
    SQUARE,
    apply,
    assert_becomes,
    assert_keeps,
    assert_not_matched,
    assert_refuses,
    attention,
    lines,
    program,
)

RULE = FuseSpelledAttention()
RULES = (RULE, *MOVES)
LOWEST = torch.finfo(torch.float32).min

BIAS = f"{QKV}input %bias: f32[batch, 1, sequence, keys]\n"
MASK = f"{QKV}input %mask: bool[batch, 1, sequence, keys]\n"
HIDDEN = f"{MASK}%hidden = aten.bitwise_not.default(self=%mask)\n"
BOTH = f"{BIAS}input %mask: bool[batch, 1, sequence, keys]\n"
FACTOR = f"{QKV}input %factor: f32[4, 1, 1]\n"
SINK = f"{QKV}input %sink: f32[4]\n"


def spelled(
    *calls: str, head: str = QKV, k: str = "%k", q: str = "%q", after: Sequence[str] = (), axis: int = 3
) -> str:
    """The eager spelling, with ``calls`` between its product ``%s`` and the softmax, and others ``after`` that.

    The softmax reads the last of the former, the product with the values the last of the latter."""
    scores, weights = (
        made[-1].split(" ", maxsplit=1)[0] if made else name for made, name in ((calls, "s"), (after, "w"))
    )
    return f"""{head}
        %t = aten.transpose.int(self={k}, dim0=2, dim1=3)
        %s = aten.matmul.default(self={q}, other=%t)
        {lines(*calls)}
        %w = aten.softmax.int(self=%{scores}, dim={axis})
        {lines(*after)}
        %o = aten.matmul.default(self=%{weights}, other=%v)
        output y = %o"""


def times(number: float, of: str = "s", name: str = "m") -> str:
    return f"{name} = mul.Tensor(self=%{of}, other={number})"


def plus(bias: str = "bias", of: str = "s", name: str = "b") -> str:
    return f"{name} = add.Tensor(self=%{of}, other=%{bias})"


def capped(of: str, cap: float = 30.0) -> tuple[str, ...]:
    return (
        f"d = div.Tensor(self=%{of}, other={cap})",
        "h = tanh.default(self=%d)",
        f"c = mul.Tensor(self=%h, other={cap})",
    )


def filled(value: float, of: str = "s", name: str = "f") -> str:
    return f"{name} = masked_fill.Scalar(self=%{of}, mask=%hidden, value={value})"


SHOWN = "f = where.ScalarOther(condition=%mask, self=%s, other=-inf)"


# Scales


Q_SCALED = f"{QKV}%qs = aten.mul.Tensor(self=%q, other=0.5)\n"
K_SCALED = f"{QKV}%ks = aten.mul.Tensor(self=%k, other=0.25)\n"
TURNED_AND_SCALED = spelled().replace("other=%t", "other=%ts").replace("%s =", f"{lines(times(0.25, 't', 'ts'))}\n%s =")


@pytest.mark.parametrize(
    ("body", "after"),
    [
        (spelled(), attention(QKV, "scale=1.0")),
        (spelled(times(0.5)), attention(QKV, "scale=0.5")),
        (spelled("m = div.Tensor(self=%s, other=4.0)"), attention(QKV, "scale=0.25")),
        (spelled(times(2), times(0.25, "m", "n")), attention(QKV, "scale=0.5")),
        (spelled(times(-0.5)), attention(QKV, "scale=-0.5")),
        (spelled(times(0.0)), attention(QKV, "scale=0.0")),
        (spelled(head=Q_SCALED, q="%qs"), attention(QKV, "scale=0.5")),
        (spelled(head=Q_SCALED.replace("mul", "div"), q="%qs"), attention(QKV, "scale=2.0")),
        (spelled(times(3.0), head=Q_SCALED, q="%qs"), attention(QKV, "scale=1.5")),
        (spelled(head=K_SCALED, k="%ks"), attention(K_SCALED, "scale=1.0", qkv="q=%q, k=%ks, v=%v")),
        (
            TURNED_AND_SCALED,
            attention(
                QKV
                + lines(
                    "t = transpose.int(self=%k, dim0=2, dim1=3)",
                    times(0.25, "t", "ts"),
                    "transpose = transpose.int(self=%ts, dim0=2, dim1=3)",
                ),
                "scale=1.0",
                qkv="q=%q, k=%transpose, v=%v",
            ),
        ),
        (spelled(times(2.0), *capped("m")), attention(QKV, "scale=2.0", "softcap=30.0")),
    ],
)
def test_scales_of_queries_keys_and_scores_are_one(body: str, after: str) -> None:
    assert_becomes(body, after, RULES)


# Biases


def biased(shape: str) -> str:
    return f"{QKV}input %bias: f32[{shape}]\n"


HALF_BIAS = f"{BIAS}{lines('mul = mul.Tensor(self=%bias, other=0.5)')}"
TWO = f"{BIAS}input %other: f32[1, 4, sequence, keys]\n"
SUM = f"{TWO}{lines('add = add.Tensor(self=%bias, other=%other)')}"


@pytest.mark.parametrize(
    ("body", "after"),
    [
        (spelled(plus(), head=BIAS), attention(BIAS, "bias=%bias", "scale=1.0")),
        (
            spelled("b = add.Tensor(self=%bias, other=%s)", head=BIAS),
            attention(BIAS, "bias=%bias", "scale=1.0"),
        ),
        (spelled(times(0.5), plus(of="m"), head=BIAS), attention(BIAS, "bias=%bias", "scale=0.5")),
        (spelled(plus(), times(0.5, "b"), head=BIAS), attention(HALF_BIAS, "bias=%mul", "scale=0.5")),
        (spelled(plus(), plus("other", "b", "c"), head=TWO), attention(SUM, "bias=%add", "scale=1.0")),
        (
            spelled(times(2.0), *capped("m"), plus(of="c"), head=BIAS),
            attention(BIAS, "bias=%bias", "scale=2.0", "softcap=30.0"),
        ),
        *(
            (spelled(plus(), head=biased(shape)), attention(biased(shape), "bias=%bias", "scale=1.0"))
            for shape in (
                "batch, 4, sequence, keys", "1, 4, sequence, keys", "batch, 4, 1, keys", "batch, 4, sequence, 1",
                "batch, 1, 1, keys", "4, sequence, keys", "4, 1, 1", "sequence, keys", "sequence, 1", "keys", "1", "",
            )
        ),
    ],
)  # fmt: skip
def test_what_is_added_is_the_bias(body: str, after: str) -> None:
    assert_becomes(body, after, RULES)


# Masks


NOT_HIDDEN = f"{HIDDEN}{lines('bitwise_not = bitwise_not.default(self=%hidden)')}"
KEPT_BIAS = f"{BOTH}{lines(f'where = where.ScalarOther(condition=%mask, self=%bias, other={LOWEST})')}"
TWO_MASKS = f"{MASK}input %mask2: bool[1, 4, 1, keys]\n"
SHOWN_BY_BOTH = f"{TWO_MASKS}{lines('bitwise_and = bitwise_and.Tensor(self=%mask, other=%mask2)')}"
SHOWN_2 = "g = where.ScalarOther(condition=%mask2, self=%f, other=-inf)"


@pytest.mark.parametrize(
    ("body", "after"),
    [
        *(
            (spelled(filled(low), head=HIDDEN), attention(NOT_HIDDEN, "bias=%bitwise_not", "scale=1.0"))
            for low in (float("-inf"), LOWEST, -10000.0, -1e9)
        ),
        *(
            (spelled(SHOWN.replace("-inf", str(low)), head=MASK), attention(MASK, "bias=%mask", "scale=1.0"))
            for low in (float("-inf"), LOWEST, -10000.0)
        ),
        (
            spelled("f = where.ScalarSelf(condition=%hidden, self=-inf, other=%s)", head=HIDDEN),
            attention(NOT_HIDDEN, "bias=%bitwise_not", "scale=1.0"),
        ),
        (spelled(SHOWN, times(0.5, "f"), head=MASK), attention(MASK, "bias=%mask", "scale=0.5")),
        (spelled(SHOWN, plus(of="f"), head=BOTH), attention(KEPT_BIAS, "bias=%where", "scale=1.0")),
        (
            spelled(plus(), SHOWN.replace("self=%s", "self=%b"), head=BOTH),
            attention(KEPT_BIAS, "bias=%where", "scale=1.0"),
        ),
        (spelled(SHOWN, SHOWN_2, head=TWO_MASKS), attention(SHOWN_BY_BOTH, "bias=%bitwise_and", "scale=1.0")),
    ],
)
def test_what_is_hidden_is_a_mask(body: str, after: str) -> None:
    assert_becomes(body, after, RULES)


FLOOR = f"{MASK}weight %lowest: f32[]\n"
RAISED = {
    "constant": (
        MASK,
        "r = maximum.default(self=%f, other=%lowest)",
        "lowest = full.default(size=[], fill_value={}, dtype=f32)",
    ),
    "clamp": (MASK, "r = clamp.default(self=%f, min={})", ""),
}


def raised(kind: str, low: float, *more: str) -> str:
    """Hidden scores that are raised to a floor."""
    head, step, constant = RAISED[kind]
    return spelled(SHOWN, step.format(low), *more, head=head + lines(*[constant.format(low)] * bool(constant)))


@pytest.mark.parametrize("kind", list(RAISED))
@pytest.mark.parametrize("low", [LOWEST, -10000.0])
def test_hidden_scores_that_are_raised_to_a_low_stay_hidden(kind: str, low: float) -> None:
    assert_becomes(raised(kind, low), attention(MASK, "bias=%mask", "scale=1.0"), RULES)


@pytest.mark.parametrize("low", [LOWEST, -1.0])
def test_a_floor_may_be_a_weight(low: float) -> None:
    graph = parse(program(spelled(SHOWN, RAISED["constant"][1], head=FLOOR)), {"lowest": torch.tensor(low)})
    log = apply_rules(graph, RULES, "test")
    if low == LOWEST:
        assert log.matches["FuseSpelledAttention"] == 1
    else:
        assert [refused.reason for refused in log.refusals] == [HIGH_FLOOR]


HIGH_FLOOR = "the scores are raised to a number that hidden keys are not below"


@pytest.mark.parametrize(
    "body",
    [
        raised("constant", -100.0),
        raised("clamp", 0.0),
        spelled("r = maximum.default(self=%s, other=%bias)", head=BIAS),
    ],
)
def test_a_floor_that_is_no_low_is_refused(body: str) -> None:
    assert_refuses(body, RULE, HIGH_FLOOR)


@pytest.mark.parametrize(
    "body",
    [
        spelled("r = clamp.default(self=%s, min=-100000.0, max=5.0)"),
        spelled("r = clamp.default(self=%s, max=5.0)"),
        spelled("r = minimum.default(self=%s, other=%bias)", head=BIAS),
    ],
)
def test_a_ceiling_does_not_match(body: str) -> None:
    assert_not_matched(body, RULE)


# Factors, gates, weights


BY_FACTOR = "g = mul.Tensor(self=%s, other=%factor)"
SCALED_QUERY = f"{FACTOR}{lines('mul = mul.Tensor(self=%q, other=%factor)')}"
FACTOR_OF_WEIGHTS = f"""{FACTOR}
    %attention = graphopt.attention.default(q=%q, k=%k, v=%v, scale=1.0)
    %o = aten.mul.Tensor(self=%attention, other=%factor)
    output y = %o"""


@pytest.mark.parametrize(
    ("body", "after"),
    [
        (spelled(BY_FACTOR, head=FACTOR), attention(SCALED_QUERY, "scale=1.0", qkv="q=%mul, k=%k, v=%v")),
        (
            spelled("g = mul.Tensor(self=%factor, other=%s)", times(0.5, "g"), head=FACTOR),
            attention(SCALED_QUERY, "scale=0.5", qkv="q=%mul, k=%k, v=%v"),
        ),
        (spelled(head=FACTOR, after=[BY_FACTOR.replace("%s", "%w")]), FACTOR_OF_WEIGHTS),
        (
            spelled(head=FACTOR.replace("4, 1, 1", ""), after=[BY_FACTOR.replace("%s", "%w")]),
            FACTOR_OF_WEIGHTS.replace("4, 1, 1", ""),
        ),
    ],
)
def test_a_factor_of_each_head_goes_to_queries_or_results(body: str, after: str) -> None:
    assert_becomes(body, after, RULES)


@pytest.mark.parametrize("casts", ["scores", "weights", "softmax"])
def test_steps_in_another_precision_fire(casts: str) -> None:
    down = "r = to.dtype(self=%w, dtype=f32)"
    up = ["d = to.dtype(self=%s, dtype=f64)"] if casts == "scores" else []
    after = ["d = to.dtype(self=%w, dtype=f64)", "r = to.dtype(self=%d, dtype=f32)"] if casts == "weights" else [down]
    body = spelled(*up, after=after)
    if casts == "softmax":
        body = body.replace("dim=3)\n", "dim=3, dtype=f64)\n").replace("dim1=3, dtype=f64)", "dim1=3)")
    assert_becomes(body, attention(QKV, "scale=1.0"), RULES)


POSITIONS = lines(
    "i = arange.start_step(start=0, end=sequence, dtype=i64)",
    "c = unsqueeze.default(self=%i, dim=1)",
    "le = le.Tensor(self=%i, other=%c)",
    "gate = to.dtype(self=%le, dtype=f32)",
    "rest = rsub.Scalar(self=%gate, other=1)",
    "low = mul.Tensor(self=%rest, other=-10000.0)",
)
GATED = f"{SQUARE}{POSITIONS}"
GATE = "g = mul.Tensor(self=%s, other=%gate)"


@pytest.mark.parametrize("scale", [(), (times(2.0, "b", "n"),)])
def test_a_gate_that_the_mask_says_again_goes(scale: tuple[str, ...]) -> None:
    """``w * b + -1e4 * (1 - b)`` of OpenAI GPT."""
    doubled = lines("mul = mul.Tensor(self=%low, other=2.0)")
    after = (
        attention(f"{GATED}\n{doubled}", "bias=%mul", "scale=2.0")
        if scale
        else attention(GATED, "bias=%low", "scale=1.0")
    )
    assert_becomes(spelled(GATE, plus("low", "g"), *scale, head=GATED), after, RULES)


NOT_SAID = "the scores are multiplied by %gate, which is no mask that is added as well"
NUMBERS = GATED.replace("input %q", "input %gate: f32[sequence, sequence]\ninput %q").replace(
    "%gate = aten.to.dtype(self=%le, dtype=f32)", ""
)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (spelled(GATE, head=GATED), NOT_SAID),
        (spelled(GATE, plus("rest", "g"), head=GATED), NOT_SAID),
        (spelled(GATE, plus("low", "g"), head=GATED.replace("-10000.0", "-100.0")), NOT_SAID),
        (spelled(GATE, plus("low", "g"), times(0.5, "b", "n"), head=GATED), NOT_SAID),  # -5000 is not known to hide
        (spelled(GATE, plus("low", "g"), head=GATED.replace("le.Tensor", "ge.Tensor", 1)), None),
        (spelled(GATE, plus("low", "g"), head=GATED.replace("self=%gate, other=1", "self=%gate, other=2")), NOT_SAID),
        (spelled(GATE, plus("low", "g"), head=NUMBERS), NOT_SAID),
        (
            spelled(plus("low"), GATE.replace("%s", "%b"), head=GATED),
            "the scores are multiplied after a mask",
        ),
    ],
)
def test_a_gate_that_no_mask_says_again_is_refused(body: str, reason: str | None) -> None:
    if reason is None:
        assert apply(body, *RULES).matches["FuseSpelledAttention"] == 1
        assert_keeps(body, *RULES)
    else:
        assert_refuses(body, RULE, reason)


# Sinks


def with_sinks(softmax: str = "w0", *shift: str, shape: str = "1, 4, 1, 1", head: str = SINK, end: str = "keys") -> str:
    """gpt-oss: a score for each head that joins the softmax."""
    return f"""{head}
        %t = aten.transpose.int(self=%k, dim0=2, dim1=3)
        %s = aten.matmul.default(self=%q, other=%t)
        %r = aten.reshape.default(self=%sink, shape=[{shape}])
        %e = aten.expand.default(self=%r, size=[batch, 4, sequence, 1])
        %w0 = aten.cat.default(tensors=[%s, %e], dim=3)
        {lines(*shift)}
        %p = aten.softmax.int(self=%{softmax}, dim=3)
        %x = aten.slice.Tensor(self=%p, dim=3, start=0, end={end})
        %o = aten.matmul.default(self=%x, other=%v)
        output y = %o"""


MAXIMUM = "a, %i = max.dim(self=%w0, dim=3, keepdim=True)"


@pytest.mark.parametrize(
    "body",
    [
        with_sinks(),
        with_sinks("b", MAXIMUM, "b = sub.Tensor(self=%w0, other=%a)"),
        with_sinks("b", "a = amax.default(self=%w0, dim=[3], keepdim=True)", "b = sub.Tensor(self=%w0, other=%a)"),
    ],
)
def test_sinks_join_the_softmax(body: str) -> None:
    assert_becomes(body, attention(SINK, "sinks=%sink", "scale=1.0"), RULES)


def test_sinks_of_one_head_each_in_four_axes_are_flattened() -> None:
    head = SINK.replace("%sink: f32[4]", "%sink: f32[1, 4, 1, 1]")
    body = with_sinks(head=head).replace("%r = aten.reshape.default(self=%sink, shape=[1, 4, 1, 1])\n", "")
    flat = f"{head}{lines('reshape = reshape.default(self=%sink, shape=[4])')}"
    assert_becomes(body.replace("self=%r,", "self=%sink,"), attention(flat, "sinks=%reshape", "scale=1.0"), RULES)


FEWER = SINK.replace("dim keys in [1", "dim keys in [2").replace("%v: f32[batch, 4, keys", "%v: f32[batch, 4, keys - 1")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            with_sinks(head=SINK.replace("%sink: f32[4]", "%sink: f32[batch]"), shape="batch, 1, 1, 1"),
            "what joins the softmax is f32[batch, 4, sequence, 1], not one score for each head",
        ),
        (
            with_sinks(head=SINK.replace("%sink: f32[4]", "%sink: f32[1]"), shape="1, 1, 1, 1"),
            "what joins the softmax is f32[batch, 4, sequence, 1], not one score for each head",
        ),
        (
            with_sinks().replace("tensors=[%s, %e]", "tensors=[%s, %e2]").replace("input %sink: f32[4]", "")
            .replace("%r = aten.reshape.default(self=%sink, shape=[1, 4, 1, 1])", "")
            .replace("%e = aten.expand.default(self=%r, size=[batch, 4, sequence, 1])", "")
            .replace("input %v", "input %e2: f32[batch, 4, sequence, 1]\ninput %v"),
            "what joins the softmax is f32[batch, 4, sequence, 1], not one score for each head",
        ),
        (
            with_sinks(end="keys - 1", head=FEWER),
            "the weights of some keys are left out",
        ),
    ],
)  # fmt: skip
def test_sinks_of_other_shapes_are_refused(body: str, reason: str) -> None:
    assert apply(body, RULE).reasons == [reason]
