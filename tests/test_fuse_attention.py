"""fuse_attention: SDPA and eager spellings, grouped heads, rotary embeddings, proven masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from graphopt.errors import NoMatchError
from graphopt.passes.fuse_attention import (
    FoldRepeatKv,
    FuseAttention,
    FuseMatmulSoftmax,
    FuseRotary,
    FuseSdpa,
    ProveMask,
)
from graphopt.rewrite import Rule
from tests.rules import (
    SIZES,
    Case,
    apply,
    apply_pass,
    assert_computes,
    assert_equal,
    assert_equal_runs,
    assert_fires,
    assert_idempotent,
    assert_not_matched,
    assert_refuses,
    program,
)

DIMS = """
    dim batch in [1, ...]
    dim sequence in [1, ...]
    dim keys in [1, ...]
"""
QKV = f"""{DIMS}
    input %q: f32[batch, 4, sequence, 8]
    input %k: f32[batch, 4, keys, 8]
    input %v: f32[batch, 4, keys, 6]
"""
GROUPED = QKV.replace("batch, 4, keys", "batch, 2, keys")
RESULT = "f32[batch, 4, sequence, 6]"
SCORES = "f32[batch, 4, sequence, keys]"


def attention(head: str, *args: str) -> str:
    """A graph of one attention."""
    call = ", ".join(("q=%q", "k=%k", "v=%v", *args))
    return f"{head}\n%o: {RESULT} = graphopt.attention.default({call})\noutput y = %o"


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


# softmax(q @ k.T) @ v


def eager(*lines: str, head: str = QKV, q: str = "%q", k: str = "%k", scores: str = "%s", weights: str = "%w") -> str:
    """The eager spelling, with ``lines`` between its scores ``%s`` and the softmax, which reads ``scores``."""
    middle = "\n".join(lines)
    return f"""{head}
        %t: f32[batch, 4, 8, keys] = aten.transpose.int(self={k}, dim0=2, dim1=3)
        %s: {SCORES} = aten.matmul.default(self={q}, other=%t)
        {middle}
        %w: {SCORES} = aten.softmax.int(self={scores}, dim=3)
        %o: {RESULT} = aten.matmul.default(self={weights}, other=%v)
        output y = %o"""


def scaled(op: str, number: float, of: str = "%s", name: str = "%m") -> str:
    return f"{name}: {SCORES} = aten.{op}.Tensor(self={of}, other={number})"


Q_SCALED = f"{QKV}%qs: f32[batch, 4, sequence, 8] = aten.mul.Tensor(self=%q, other=0.5)\n"
K_SCALED = f"{QKV}%ks: f32[batch, 4, keys, 8] = aten.mul.Tensor(self=%k, other=0.25)\n"
BOTH_SCALED = f"{Q_SCALED}%ks: f32[batch, 4, keys, 8] = aten.mul.Tensor(self=%k, other=0.25)\n"
CAP = (
    f"%d: {SCORES} = aten.div.Tensor(self=%m, other=30.0)",
    f"%h: {SCORES} = aten.tanh.default(self=%d)",
    f"%c: {SCORES} = aten.mul.Tensor(self=%h, other=30.0)",
)
ADD = f"%b: {SCORES} = aten.add.Tensor(self=%m, other=%bias)"


@pytest.mark.parametrize(
    ("body", "head", "after"),
    [
        (eager(), QKV, ("scale=1.0",)),
        (eager(scaled("mul", 0.5), scores="%m"), QKV, ("scale=0.5",)),
        (eager(scaled("div", 4.0), scores="%m"), QKV, ("scale=0.25",)),
        (eager(head=Q_SCALED, q="%qs"), QKV, ("scale=0.5",)),
        (eager(head=K_SCALED, k="%ks"), QKV, ("scale=0.25",)),
        (eager(head=BOTH_SCALED, q="%qs", k="%ks"), QKV, ("scale=0.125",)),
        (eager(scaled("mul", 3.0), head=BOTH_SCALED, q="%qs", k="%ks", scores="%m"), QKV, ("scale=0.375",)),
        (eager(scaled("mul", 2.0), *CAP, scores="%c"), QKV, ("scale=2.0", "softcap=30.0")),
        (eager(scaled("mul", 0.5), ADD, head=ADDED, scores="%b"), ADDED, ("bias=%bias", "scale=0.5")),
        (
            eager(ADD.replace("self=%m, other=%bias", "self=%bias, other=%s"), head=ADDED, scores="%b"),
            ADDED,
            ("bias=%bias", "scale=1.0"),
        ),
        (
            eager(scaled("mul", 2.0), *CAP, ADD.replace("%m", "%c"), head=ADDED, scores="%b"),
            ADDED,
            ("bias=%bias", "scale=2.0", "softcap=30.0"),
        ),
    ],
)
def test_softmax_fires_and_is_equal(body: str, head: str, after: tuple[str, ...]) -> None:
    assert_attends(body, FuseMatmulSoftmax(), head, *after)


def test_a_softmax_in_another_precision_fires() -> None:
    body = eager(weights="%r").replace(
        f"%w: {SCORES} = aten.softmax.int(self=%s, dim=3)",
        f"""%w: f64[batch, 4, sequence, keys] = aten.softmax.int(self=%s, dim=3, dtype=f64)
        %r: {SCORES} = aten.to.dtype(self=%w, dtype=f32)""",
    )
    assert_attends(body, FuseMatmulSoftmax(), QKV, "scale=1.0")


def test_softmax_computes_attention() -> None:
    def formula(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        capped = 30 * torch.tanh(2 * q @ k.mT / 30)
        return torch.softmax(capped + bias, -1) @ v

    body = eager(scaled("mul", 2.0), *CAP, ADD.replace("%m", "%c"), head=ADDED, scores="%b")
    assert_computes(apply(body, FuseMatmulSoftmax()).text, formula)


@pytest.mark.parametrize(("value", "op"), [("%w", "softmax.int"), ("%s", "matmul.default"), ("%t", "transpose.int")])
def test_softmax_refuses_values_that_escape(value: str, op: str) -> None:
    reason = f"{value} (aten.{op}) is also used by"
    assert_refuses(f"{eager()}\noutput z = {value}", FuseMatmulSoftmax(), f"{reason} an output")
    used = eager().replace("output y", f"%z: {TYPES[value]} = aten.neg.default(self={value})\noutput z = %z\noutput y")
    assert_refuses(used, FuseMatmulSoftmax(), f"{reason} aten.neg.default")


TYPES = {"%w": SCORES, "%s": SCORES, "%t": "f32[batch, 4, 8, keys]"}


def test_a_scaled_query_that_escapes_stays_scaled() -> None:
    body = eager(head=Q_SCALED, q="%qs") + "\noutput z = %qs"
    after = attention(Q_SCALED, "scale=1.0").replace("q=%q,", "q=%qs,") + "\noutput z = %qs"
    case = Case("escape", FuseMatmulSoftmax(), body, after)
    assert_fires(case)
    assert_equal(case)


FLAT = """
    dim keys in [1, ...]
    input %q: f32[4, 3, 5, 8]
    input %k: f32[4, 3, keys, 8]
    input %v: f32[keys, 6]
    %t: f32[4, 3, 8, keys] = aten.transpose.int(self=%k, dim0=2, dim1=3)
    %s: f32[4, 3, 5, keys] = aten.matmul.default(self=%q, other=%t)
    %w: f32[4, 3, 5, keys] = aten.softmax.int(self=%s, dim=3)
    %o: f32[4, 3, 5, 6] = aten.matmul.default(self=%w, other=%v)
    output y = %o"""


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (FLAT, "v has 2 dimensions, not 4 (b h t e)"),
        (eager(head=QKV.replace("%v: f32[batch, 4", "%v: f32[batch, 1")), "v is 1 at h, expected 4"),
        (eager(head=QKV.replace("%q: f32[batch, 4", "%q: f32[batch, 1")), "k is 4 at h, expected 1"),
    ],
)
def test_softmax_refuses_other_shapes(body: str, reason: str) -> None:
    assert_refuses(body, FuseMatmulSoftmax(), reason)


def test_softmax_refuses_mixed_dtypes() -> None:
    body = eager(head=QKV.replace("%v: f32", "%v: f64"), weights="%r").replace(
        f"%o: {RESULT}", f"%r: f64[batch, 4, sequence, keys] = aten.to.dtype(self=%w, dtype=f64)\n%o: f64{RESULT[3:]}"
    )
    assert_refuses(body, FuseMatmulSoftmax(), "mixed dtypes")


@pytest.mark.parametrize(
    "body",
    [
        eager().replace("softmax.int(self=%s, dim=3)", "softmax.int(self=%s, dim=2)"),
        eager(ADD[:-1].replace("%m", "%s") + ", alpha=2)", head=ADDED, scores="%b"),
        eager(
            scaled("div", 4.0)[:-1].replace("div.Tensor", "div.Tensor_mode") + ', rounding_mode="floor")', scores="%m"
        ),
        eager(scaled("mul", 1.0), *CAP[:2], CAP[2].replace("30.0", "20.0"), scores="%c"),
        eager().replace("softmax.int", "log_softmax.int"),
    ],
)
def test_what_is_no_attention_does_not_match(body: str) -> None:
    assert_not_matched(body, FuseMatmulSoftmax())


def test_numbers_that_are_added_as_truths_stay_numbers() -> None:
    """``scores + bool`` adds one; a bool ``bias`` of attention would hide keys instead."""
    body = eager(f"%b: {SCORES} = aten.add.Tensor(self=%s, other=%mask)", head=TRUTHS, scores="%b")
    assert_equal_runs(program(body), apply(body, FuseMatmulSoftmax()).text)


@pytest.mark.parametrize("number", [0, 0.0])
def test_a_scale_of_zero_stays_zero(number: float) -> None:
    body = eager(head=Q_SCALED.replace("0.5", str(number)), q="%qs")
    assert_equal_runs(program(body), apply(body, FuseMatmulSoftmax()).text)


def test_a_bias_that_widens_the_batch_is_no_crash() -> None:
    head = ADDED.replace("%q: f32[batch", "%q: f32[1").replace("%k: f32[batch", "%k: f32[1")
    body = eager(ADD.replace("%m", "%s"), head=head.replace("%v: f32[batch", "%v: f32[1"), scores="%b")
    body = body.replace("%t: f32[batch", "%t: f32[1").replace("%s: f32[batch", "%s: f32[1")
    assert_equal_runs(program(body), apply(body, FuseMatmulSoftmax()).text)


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


POSITIONS = """
    input %mask: i64[batch, keys]
    %i: i64[sequence] = aten.arange.start_step(start=0, end=sequence, dtype=i64)
    %j: i64[keys] = aten.arange.start_step(start=0, end=keys, dtype=i64)
    %c: i64[sequence, 1] = aten.unsqueeze.default(self=%i, dim=1)
    %distance: i64[sequence, keys] = aten.sub.Tensor(self=%c, other=%j)
    %causal: bool[sequence, keys] = aten.ge.Scalar(self=%distance, other=0)
    %near: bool[sequence, keys] = aten.le.Scalar(self=%distance, other=2)
    %ahead: bool[sequence, keys] = aten.ge.Scalar(self=%distance, other=-1)
    %band: bool[sequence, keys] = aten.bitwise_and.Tensor(self=%near, other=%ahead)
    %pad: bool[batch, keys] = aten.to.dtype(self=%mask, dtype=bool)
    %pad3: bool[batch, 1, keys] = aten.unsqueeze.default(self=%pad, dim=1)
    %padding: bool[batch, 1, 1, keys] = aten.unsqueeze.default(self=%pad3, dim=2)
    %both3: bool[batch, sequence, keys] = aten.bitwise_and.Tensor(self=%causal, other=%pad3)
    %both: bool[batch, 1, sequence, keys] = aten.unsqueeze.default(self=%both3, dim=1)
    %zero: f32[] = aten.full.default(size=[], fill_value=0.0, dtype=f32)
    %added: f32[batch, 1, sequence, keys] = aten.where.ScalarOther(condition=%both, self=%zero, other=-inf)
    %either3: bool[batch, sequence, keys] = aten.bitwise_or.Tensor(self=%causal, other=%pad3)
    %either: bool[batch, 1, sequence, keys] = aten.unsqueeze.default(self=%either3, dim=1)
"""
MASKED = QKV + POSITIONS
MASK_INPUT = f"{QKV}input %mask: i64[batch, keys]\n"
PAD = "%pad: bool[batch, keys] = aten.to.dtype(self=%mask, dtype=bool)\n"


@pytest.mark.parametrize(
    ("before", "head", "after"),
    [
        (("bias=%causal", "scale=1.0"), MASK_INPUT, ("scale=1.0", 'causal="upper_left"')),
        (("bias=%near", "scale=1.0"), MASK_INPUT, ("scale=1.0", "window_left=2")),
        (("bias=%band", "scale=1.0"), MASK_INPUT, ("scale=1.0", "window_left=2", "window_right=1")),
        (("bias=%padding", "scale=1.0"), MASK_INPUT + PAD, ("key_mask=%pad", "scale=1.0")),
        (("bias=%both", "scale=1.0"), MASK_INPUT + PAD, ("key_mask=%pad", "scale=1.0", 'causal="upper_left"')),
        (("bias=%added", "scale=1.0"), MASK_INPUT + PAD, ("key_mask=%pad", "scale=1.0", 'causal="upper_left"')),
        (
            ("bias=%padding", "scale=1.0", 'causal="lower_right"'),
            MASK_INPUT + PAD,
            ("key_mask=%pad", "scale=1.0", 'causal="lower_right"'),
        ),
        (
            ("bias=%near", "scale=1.0", 'causal="upper_left"'),
            MASK_INPUT,
            ("scale=1.0", 'causal="upper_left"', "window_left=2"),
        ),
        (
            ("bias=%causal", "scale=1.0", "softcap=5.0"),
            MASK_INPUT,
            ("scale=1.0", 'causal="upper_left"', "softcap=5.0"),
        ),
    ],
)
def test_a_mask_is_proven_and_equal(before: tuple[str, ...], head: str, after: tuple[str, ...]) -> None:
    body = attention(MASKED, *before)
    applied = apply(body, ProveMask())
    assert applied.text == program(attention(head, *after))
    assert applied.matches == {"ProveMask": 1}
    sizes = [size for size in SIZES if size["keys"] <= size["sequence"]] if "window" in str(after) else SIZES
    assert_equal_runs(program(body), applied.text, sizes)


def test_a_proven_integer_mask_is_cast_once() -> None:
    body = f"""{QKV}
        input %mask: i64[batch, keys]
        %on: bool[batch, keys] = aten.ne.Scalar(self=%mask, other=0)
        %on3: bool[batch, 1, keys] = aten.unsqueeze.default(self=%on, dim=1)
        %bias: bool[batch, 1, 1, keys] = aten.unsqueeze.default(self=%on3, dim=1)
        %p: {RESULT} = graphopt.attention.default(q=%q, k=%k, v=%v, bias=%bias, scale=1.0)
        %o: {RESULT} = graphopt.attention.default(q=%q, k=%k, v=%v, bias=%bias, scale=2.0)
        output p = %p
        output y = %o"""
    applied = apply(body, ProveMask())
    assert applied.text == program(f"""{QKV}
        input %mask: i64[batch, keys]
        %to: bool[batch, keys] = aten.to.dtype(self=%mask, dtype=bool)
        %p: {RESULT} = graphopt.attention.default(q=%q, k=%k, v=%v, key_mask=%to, scale=1.0)
        %o: {RESULT} = graphopt.attention.default(q=%q, k=%k, v=%v, key_mask=%to, scale=2.0)
        output p = %p
        output y = %o""")
    assert_equal_runs(program(body), applied.text)


LONGER = f"""{QKV}
    input %mask: bool[batch, keys + 2]
    %part: bool[batch, keys] = aten.slice.Tensor(self=%mask, dim=1, start=0, end=keys)
    %part3: bool[batch, 1, keys] = aten.unsqueeze.default(self=%part, dim=1)
    %padding: bool[batch, 1, 1, keys] = aten.unsqueeze.default(self=%part3, dim=1)
"""


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            attention(MASKED, "bias=%either", "scale=1.0"),
            "the mask %either stays a bias: it holds a condition that is no known structure: "
            "(k - q <= 0) or (%mask[b, k])",
        ),
        (
            attention(f"{QKV}input %bias: f32[batch, 1, sequence, keys]\n", "bias=%bias", "scale=1.0"),
            "the mask %bias stays a bias: it adds values that are neither 0 nor -inf",
        ),
        (attention(MASKED, "bias=%causal", "scale=1.0", 'causal="upper_left"'), "it is causal twice"),
        (attention(MASKED, "bias=%near", "scale=1.0", "window_left=3"), "it has a window already"),
        (attention(MASKED, "bias=%near", "scale=1.0", "window_right=3"), "it has a window already"),
        (attention(MASKED, "bias=%padding", "key_mask=%pad", "scale=1.0"), "it has a key mask already"),
        (attention(LONGER, "bias=%padding", "scale=1.0"), "the key mask %mask is not [batch, keys]"),
    ],
)
def test_a_mask_stays(body: str, reason: str) -> None:
    applied = apply(body, ProveMask())
    assert applied.reasons == [reason]
    assert applied.matches == {}
    assert applied.text == apply(body).text


def test_a_window_does_not_move_with_a_causal_part_from_the_lower_right() -> None:
    """A window in the mask counts from the upper left; attention's counts from where its causal part stands."""
    body = attention(MASKED, "bias=%near", "scale=1.0", 'causal="lower_right"')
    sizes = [{"batch": 2, "sequence": 3, "keys": 8}]
    assert_equal_runs(program(body), apply(body, ProveMask()).text, sizes)


def test_a_mask_of_attention_with_heads_last_counts_positions() -> None:
    body = """
        dim batch in [1, ...]
        dim sequence in [1, ...]
        input %q: f32[batch, sequence, 4, 8]
        %j: i64[sequence] = aten.arange.start_step(start=0, end=sequence, dtype=i64)
        %early: bool[sequence] = aten.lt.Scalar(self=%j, other=4)
        %bias: bool[1, sequence] = aten.unsqueeze.default(self=%early, dim=0)
        %o: f32[batch, sequence, 4, 8] = graphopt.attention.default(q=%q, k=%q, v=%q, bias=%bias, scale=1.0, heads_last=True)
        output y = %o"""
    assert_equal_runs(program(body), apply(body, ProveMask()).text)


# Rotary embeddings


ROTATED = """
    dim batch in [1, ...]
    dim sequence in [1, ...]
    input %x: f32[batch, 4, sequence, 8]
    input %f: f32[batch, sequence, 4]
    %angle: f32[batch, sequence, 8] = aten.cat.default(tensors=[%f, %f], dim=2)
    %cos: f32[batch, sequence, 8] = aten.cos.default(self=%angle)
    %sin: f32[batch, sequence, 8] = aten.sin.default(self=%angle)
"""
TURN = """
    %cu: f32[batch, 1, sequence, 8] = aten.unsqueeze.default(self=%cos, dim=1)
    %su: f32[batch, 1, sequence, 8] = aten.unsqueeze.default(self=%sin, dim=1)
    %x1: f32[batch, 4, sequence, 4] = aten.slice.Tensor(self=%x, dim=3, start=0, end=4)
    %x2: f32[batch, 4, sequence, 4] = aten.slice.Tensor(self=%x, dim=3, start=4, end=8)
    %n: f32[batch, 4, sequence, 4] = aten.neg.default(self=%x2)
    %h: f32[batch, 4, sequence, 8] = aten.cat.default(tensors=[%n, %x1], dim=3)
    %xc: f32[batch, 4, sequence, 8] = aten.mul.Tensor(self=%x, other=%cu)
    %hs: f32[batch, 4, sequence, 8] = aten.mul.Tensor(self=%h, other=%su)
    %o: f32[batch, 4, sequence, 8] = aten.add.Tensor(self=%xc, other=%hs)
    output y = %o
"""
HALVES = """
    %slice: f32[batch, sequence, 4] = aten.slice.Tensor(self=%cos, dim=2, start=0, end=4)
    %slice_1: f32[batch, sequence, 4] = aten.slice.Tensor(self=%sin, dim=2, start=0, end=4)
    %o: f32[batch, 4, sequence, 8] = graphopt.rotary_embedding.default(x=%x, cos=%slice, sin=%slice_1)
    output y = %o
"""


def shared_angles(body: str) -> str:
    """One set of angles for the whole batch."""
    for name in ("f", "angle", "cos", "sin", "cu", "su", "slice", "slice_1"):
        body = body.replace(f"%{name}: f32[batch", f"%{name}: f32[1")
    return body


SCALED_ANGLES = """
    %cosine: f32[batch, sequence, 8] = aten.mul.Tensor(self=%cos, other=0.5)
    %sine: f32[batch, sequence, 8] = aten.mul.Tensor(self=%sin, other=0.5)
"""


def scaled_angles(body: str) -> str:
    return body.replace("self=%cos", "self=%cosine").replace("self=%sin", "self=%sine")


@pytest.mark.parametrize(
    "case",
    [
        Case("rotary", FuseRotary(), ROTATED + TURN, ROTATED + HALVES),
        Case("one set of angles", FuseRotary(), shared_angles(ROTATED + TURN), shared_angles(ROTATED + HALVES)),
        Case(
            "scaled angles",
            FuseRotary(),
            ROTATED + SCALED_ANGLES + scaled_angles(TURN),
            ROTATED + SCALED_ANGLES + scaled_angles(HALVES),
        ),
        Case(
            "swapped operands",
            FuseRotary(),
            ROTATED
            + TURN.replace("self=%xc, other=%hs", "self=%hs, other=%xc").replace("self=%x, other=%cu", "self=%cu, other=%x"),
            ROTATED + HALVES,
        ),
    ],
    ids=str,
)  # fmt: skip
def test_rotary_fires_and_is_equal(case: Case) -> None:
    assert_fires(case)
    assert_equal(case)


def test_rotary_computes_rotation() -> None:
    def formula(x: Tensor, f: Tensor) -> Tensor:
        turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(f), f).unsqueeze(1)
        return torch.cat([turned.real, turned.imag], -1)

    assert_computes(program(ROTATED + HALVES), formula)


def test_two_tensors_are_turned_by_one_pair_of_slices() -> None:
    second = TURN.replace("%o", "%p").replace("output y", "output p")
    for name in ("x1", "x2", "n", "h", "xc", "hs"):
        second = second.replace(f"%{name}:", f"%z{name}:").replace(f"%{name},", f"%z{name},")
        second = second.replace(f"%{name})", f"%z{name})").replace(f"%{name}]", f"%z{name}]")
    second = "\n".join(line for line in second.splitlines() if "%cu:" not in line and "%su:" not in line)
    second = second.replace("self=%x,", "self=%z,")
    body = ROTATED.replace("%f:", "%f:", 1).replace("input %f", "input %z: f32[batch, 4, sequence, 8]\ninput %f", 1)
    body += TURN.replace("output y = %o", "") + second.replace("output p = %p", "") + "output y = %o\noutput p = %p"
    applied = apply(body, FuseRotary())
    assert applied.matches == {"FuseRotary": 2}
    assert applied.text.count("aten.slice.Tensor") == 2
    assert_equal_runs(program(body), applied.text)


UNEVEN = ROTATED.replace("input %f", "input %g: f32[batch, sequence, 4]\ninput %f").replace("[%f, %f]", "[%f, %g]")
GIVEN = """
    dim batch in [1, ...]
    dim sequence in [1, ...]
    input %x: f32[batch, 4, sequence, 8]
    input %cos: f32[batch, sequence, 8]
    input %sin: f32[batch, sequence, 8]
"""
OF_HEADS = GIVEN.replace("[batch, sequence, 8]", "[4, 8]")
NARROW = GIVEN.replace("[batch, sequence, 8]", "[batch, sequence, 1]")
MIXED_SINE = ROTATED.replace("%sin: f32[batch, sequence, 8] = aten.sin.default(self=%angle)", "").replace(
    "input %f", "input %sin: f32[batch, sequence, 8]\ninput %f"
)


def unequal(name: str) -> str:
    return f"the two halves of {name} (%{name}) are not shown to be equal"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (UNEVEN + TURN, unequal("cos")),
        (GIVEN + TURN, unequal("cos")),
        (MIXED_SINE + TURN, unequal("sin")),
        (OF_HEADS + TURN.replace("u: f32[batch, 1, sequence, 8]", "u: f32[4, 1, 8]"), "cos is not [batch, sequence, 8]"),
        (
            NARROW + TURN.replace("u: f32[batch, 1, sequence, 8]", "u: f32[batch, 1, sequence, 1]"),
            "cos is not [batch, sequence, 8]",
        ),
        (
            ROTATED + TURN.replace("start=4", "start=3").replace("start=0, end=4", "start=0, end=3")
            .replace("%x1: f32[batch, 4, sequence, 4]", "%x1: f32[batch, 4, sequence, 3]")
            .replace("%x2: f32[batch, 4, sequence, 4]", "%x2: f32[batch, 4, sequence, 5]")
            .replace("%n: f32[batch, 4, sequence, 4]", "%n: f32[batch, 4, sequence, 5]"),
            "x is not turned by halves",
        ),
    ],
)  # fmt: skip
def test_rotary_refuses(body: str, reason: str) -> None:
    assert_refuses(body, FuseRotary(), reason)


def test_rotary_refuses_values_that_escape() -> None:
    body = f"{ROTATED}{TURN}output h = %h\n"
    assert_refuses(body, FuseRotary(), "%h (aten.cat.default) is also used by an output")


def test_rotary_of_another_precision_is_no_crash() -> None:
    body = ROTATED + TURN
    for name in ("x", "x1", "x2", "n", "h"):
        body = body.replace(f"%{name}: f32", f"%{name}: f16")
    assert_equal_runs(program(body), apply(body, FuseRotary()).text)


# The pass


def test_the_pass_fuses_and_proves() -> None:
    body = sdpa(MASKED, ", attn_mask=%both")
    applied = apply_pass(body, FuseAttention())
    assert applied.text == program(attention(MASK_INPUT + PAD, "key_mask=%pad", DEFAULT, 'causal="upper_left"'))
    assert applied.matches == {"FuseSdpa": 1, "ProveMask": 1}
    assert_equal_runs(program(body), applied.text)


def test_without_prove_masks_a_mask_stays_a_bias() -> None:
    applied = apply_pass(sdpa(MASKED, ", attn_mask=%causal"), FuseAttention(prove_masks=False))
    assert "bias=%causal" in applied.text
    assert applied.matches == {"FuseSdpa": 1}
    assert applied.reasons == []


def test_without_rotary_it_stays_apart() -> None:
    with pytest.raises(NoMatchError):
        apply_pass(ROTATED + TURN, FuseAttention(rotary=False))
    assert apply_pass(ROTATED + TURN, FuseAttention()).matches == {"FuseRotary": 1}


def test_grouped_heads_of_the_eager_spelling() -> None:
    body = eager(head=GROUPED + repeated("k", 8) + repeated("v", 6), k="%kr").replace("other=%v)", "other=%vr)")
    applied = apply_pass(body, FuseAttention())
    assert applied.text == program(attention(GROUPED, "scale=1.0"))
    assert applied.matches == {"FuseMatmulSoftmax": 1, "FoldRepeatKv": 1}
    assert_equal_runs(program(body), applied.text)


@pytest.mark.parametrize(
    "body",
    [
        sdpa(MASKED, ", attn_mask=%both"),
        sdpa(MASKED, ", attn_mask=%either"),
        eager(scaled("mul", 2.0), *CAP, scores="%c"),
        grouped("scale=1.0"),
        ROTATED + TURN,
    ],
)
def test_idempotent(body: str) -> None:
    assert_idempotent(body, FuseAttention())


def test_nothing_to_fuse_is_an_error_with_its_reason() -> None:
    with pytest.raises(NoMatchError, match=r"fuse_attention changed nothing \(FuseSdpa: it has dropout\)"):
        apply_pass(sdpa(args=", dropout_p=0.5"), FuseAttention())


def test_the_report_holds_the_refusal() -> None:
    applied = apply_pass(sdpa(MASKED, ", attn_mask=%either"), FuseAttention())
    assert applied.matches == {"FuseSdpa": 1}
    assert len(applied.reasons) == 1
    assert applied.reasons[0].startswith(
        "the mask %either stays a bias: it holds a condition that is no known structure"
    )


def test_options_are_checked() -> None:
    unknown: dict[str, Any] = {"rotery": False}
    with pytest.raises(ValueError, match="rotery"):
        FuseAttention(**unknown)
