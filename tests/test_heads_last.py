"""heads_last: attention and rotary embedding read and write ``[batch, sequence, heads, size]``."""

from __future__ import annotations

import pytest

from graphopt.errors import NoMatchError
from graphopt.passes.heads_last import HeadsLast, TurnAttention, TurnRotary
from graphopt.passes.moves import MergePermutations
from graphopt.rewrite import Rule
from tests.rules import (
    DIMS,
    Case,
    apply,
    apply_pass,
    assert_equal,
    assert_equal_runs,
    assert_fires,
    assert_idempotent,
    assert_not_matched,
    program,
)

QKV = f"""{DIMS}
    dim keys in [1, ...]
    input %q: f32[batch, sequence, 4, 8]
    input %k: f32[batch, keys, 2, 8]
    input %v: f32[batch, keys, 2, 6]
    input %mask: bool[batch, keys]
    input %bias: f32[batch, 1, sequence, keys]
"""
TURNED = """
    %qt: f32[batch, 4, sequence, 8] = aten.transpose.int(self=%q, dim0=1, dim1=2)
    %kt: f32[batch, 2, keys, 8] = aten.transpose.int(self=%k, dim0=1, dim1=2)
    %vt: f32[batch, 2, keys, 6] = aten.transpose.int(self=%v, dim0=1, dim1=2)
"""


def before(args: str, head: str = QKV + TURNED) -> str:
    call = f"graphopt.attention.default(q=%qt, k=%kt, v=%vt, {args})"
    return f"{head}\n%o: f32[batch, 4, sequence, 6] = {call}\noutput y = %o"


def after(args: str, head: str = QKV) -> str:
    call = f"graphopt.attention.default(q=%q, k=%k, v=%v, {args}, heads_last=True)"
    return f"""{head}
        %attention: f32[batch, sequence, 4, 6] = {call}
        %o: f32[batch, 4, sequence, 6] = aten.transpose.int(self=%attention, dim0=1, dim1=2)
        output y = %o"""


ANGLES = f"""{DIMS}
    input %x: f32[batch, sequence, 4, 8]
    input %cos: f32[1, sequence, 3]
    input %sin: f32[1, sequence, 3]
"""
X_TURNED = "%t: f32[batch, 4, sequence, 8] = aten.transpose.int(self=%x, dim0=1, dim1=2)\n"


def rotary(args: str = "", head: str = ANGLES + X_TURNED) -> str:
    call = f"graphopt.rotary_embedding.default(x=%t, cos=%cos, sin=%sin{args})"
    return f"{head}%r: f32[batch, 4, sequence, 8] = {call}\noutput y = %r"


def rotary_after(args: str = "") -> str:
    call = f"graphopt.rotary_embedding.default(x=%x, cos=%cos, sin=%sin{args}, heads_last=True)"
    return f"""{ANGLES}
        %rotary_embedding: f32[batch, sequence, 4, 8] = {call}
        %r: f32[batch, 4, sequence, 8] = aten.transpose.int(self=%rotary_embedding, dim0=1, dim1=2)
        output y = %r"""


EVERYTHING = 'bias=%bias, key_mask=%mask, scale=0.5, causal="lower_right", window_left=9, softcap=5.0'
PACKED = QKV.replace("dim keys in [1, ...]\n", "").replace("keys", "sequence").replace("%mask: bool", "%segments: i64")
PACKED_ARGS = 'segments=%segments, scale=0.5, causal="upper_left", chunk=3'
PREFIXED_ARGS = 'prefix=%mask, scale=0.5, causal="upper_left"'
CASES = [
    Case("attention", TurnAttention(), before("scale=1.0"), after("scale=1.0")),
    Case("attention, everything", TurnAttention(), before(EVERYTHING), after(EVERYTHING)),
    Case(
        "attention, packed",
        TurnAttention(),
        before(PACKED_ARGS, PACKED + TURNED.replace("keys", "sequence")),
        after(PACKED_ARGS, PACKED),
    ),
    Case("attention, prefix", TurnAttention(), before(PREFIXED_ARGS), after(PREFIXED_ARGS)),
    Case(
        "attention, shared transpose",
        TurnAttention(),
        before("scale=1.0") + "\noutput k = %kt",
        after("scale=1.0", QKV + TURNED.splitlines()[2]) + "\noutput k = %kt",
    ),
    Case("rotary", TurnRotary(), rotary(), rotary_after()),
    Case("rotary, interleaved", TurnRotary(), rotary(", interleaved=True"), rotary_after(", interleaved=True")),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fires(case: Case) -> None:
    assert_fires(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equal(case: Case) -> None:
    assert_equal(case)


SQUARE = """
    dim batch in [1, ...]
    input %q: f32[batch, 4, 4, 8]
    input %mask: bool[batch, 4]
"""


def square(turned: str, args: str) -> str:
    return f"""{SQUARE}
        %t: f32[batch, 4, 4, 8] = aten.transpose.int(self=%q, {turned})
        %o: f32[batch, 4, 4, 8] = graphopt.attention.default({args}, scale=1.0)
        output y = %o"""


HEADS_LAST = f"{ANGLES}%r: f32[batch, sequence, 4, 8] = graphopt.rotary_embedding.default(x=%x, cos=%cos, sin=%sin, heads_last=True)\noutput y = %r"  # noqa: E501
RESHAPED = ANGLES + "%t: f32[batch, 4, sequence, 8] = aten.reshape.default(self=%x, shape=[batch, 4, sequence, 8])\n"
TURNED_AND_LAST = square("dim0=1, dim1=2", "q=%t, k=%t, v=%t").replace("scale=1.0", "scale=1.0, heads_last=True")


@pytest.mark.parametrize(
    ("rule", "body"),
    [
        (TurnAttention(), square("dim0=1, dim1=2", "q=%t, k=%t, v=%q")),
        (TurnAttention(), square("dim0=1, dim1=3", "q=%t, k=%t, v=%t").replace("[batch, 4, 4, 8]", "[batch, 4, 4, 4]")),
        (TurnAttention(), TURNED_AND_LAST),
        (TurnRotary(), rotary(head=RESHAPED)),
        (TurnRotary(), HEADS_LAST),
    ],
)
def test_does_not_match(rule: Rule, body: str) -> None:
    """Where not all three are turned, over other axes, and where the heads are last already."""
    assert_not_matched(body, rule)


# The pass


MODEL = f"""{DIMS}
    input %q: f32[batch, sequence, 4, 8]
    input %k: f32[batch, sequence, 2, 8]
    input %v: f32[batch, sequence, 2, 6]
    input %cos: f32[1, sequence, 4]
    input %sin: f32[1, sequence, 4]
    {TURNED.replace("keys", "sequence")}
    %qr: f32[batch, 4, sequence, 8] = graphopt.rotary_embedding.default(x=%qt, cos=%cos, sin=%sin)
    %kr: f32[batch, 2, sequence, 8] = graphopt.rotary_embedding.default(x=%kt, cos=%cos, sin=%sin)
    %a: f32[batch, 4, sequence, 6] = graphopt.attention.default(q=%qr, k=%kr, v=%vt, scale=1.0, causal="upper_left")
    %o: f32[batch, sequence, 4, 6] = aten.transpose.int(self=%a, dim0=1, dim1=2)
    output y = %o
"""


def test_every_transpose_goes() -> None:
    applied = apply_pass(MODEL, HeadsLast())
    head = MODEL.split("%qt", maxsplit=1)[0]
    assert applied.text == program(f"""{head}
        %rotary_embedding: f32[batch, sequence, 4, 8] = graphopt.rotary_embedding.default(x=%q, cos=%cos, sin=%sin, heads_last=True)
        %rotary_embedding_1: f32[batch, sequence, 2, 8] = graphopt.rotary_embedding.default(x=%k, cos=%cos, sin=%sin, heads_last=True)
        %attention: f32[batch, sequence, 4, 6] = graphopt.attention.default(q=%rotary_embedding, k=%rotary_embedding_1, v=%v, scale=1.0, causal="upper_left", heads_last=True)
        output y = %attention""")  # noqa: E501
    assert applied.matches == {"TurnRotary": 2, "TurnAttention": 1, "MergePermutations": 1}
    assert_equal_runs(program(MODEL), applied.text)


@pytest.mark.parametrize("body", [MODEL, *(case.before for case in CASES)])
def test_idempotent(body: str) -> None:
    assert_idempotent(body, HeadsLast())


def test_rules_of_the_pass() -> None:
    assert [type(rule) for rule in HeadsLast().rules()] == [TurnRotary, TurnAttention, MergePermutations]


def test_nothing_to_turn_is_an_error() -> None:
    with pytest.raises(NoMatchError, match="heads_last changed nothing"):
        apply_pass(square("dim0=1, dim1=2", "q=%t, k=%t, v=%q"), HeadsLast())


def test_the_result_is_turned_back_once() -> None:
    assert apply(before("scale=1.0"), TurnAttention()).text.count("aten.transpose.int") == 1
