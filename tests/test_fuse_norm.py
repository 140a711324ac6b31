"""fuse_norm: RMSNorm and LayerNorm as one op, with the residual sum before them."""

from __future__ import annotations

import pytest
from torch import Tensor
from torch.nn import functional

from graphopt.errors import NoMatchError
from graphopt.passes.fuse_norm import FuseAddLayerNorm, FuseAddRmsNorm, FuseLayerNorm, FuseNorm, FuseRmsNorm
from graphopt.rewrite import Rule
from tests.rules import (
    DIMS,
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

WHOLE = "f32[batch, sequence, 8]"
ONE = "f32[batch, sequence, 1]"
X = f"{DIMS}input %x: {WHOLE}\n"
WEIGHT = f"{X}weight %w: f32[8]\n"
BOTH = f"{WEIGHT}weight %b: f32[8]\n"
POWER = "aten.pow.Tensor_Scalar(self=%x, exponent=2)"
PRODUCT = "aten.mul.Tensor(self=%x, other=%x)"


def rms(square: str = POWER, head: str = WEIGHT, last: str = "self=%w, other=%u") -> str:
    return f"""{head}
        %p: {WHOLE} = {square}
        %m: {ONE} = aten.mean.dim(self=%p, dim=[2], keepdim=True)
        %e: {ONE} = aten.add.Tensor(self=%m, other=1e-06)
        %r: {ONE} = aten.rsqrt.default(self=%e)
        %u: {WHOLE} = aten.mul.Tensor(self=%x, other=%r)
        %n: {WHOLE} = aten.mul.Tensor({last})
        output y = %n"""


RMS = (
    f"{WEIGHT}%n: {WHOLE} = aten.rms_norm.default(input=%x, normalized_shape=[8], weight=%w, eps=1e-06)\noutput y = %n"
)

SQUARE = "aten.pow.Tensor_Scalar(self=%c, exponent=2)"
CENTRED_PRODUCT = "aten.mul.Tensor(self=%c, other=%c)"
BY_ROOT = f"""
    %r: {ONE} = aten.sqrt.default(self=%e)
    %u: {WHOLE} = aten.div.Tensor(self=%c, other=%r)"""
BY_INVERSE = f"""
    %r: {ONE} = aten.rsqrt.default(self=%e)
    %u: {WHOLE} = aten.mul.Tensor(self=%c, other=%r)"""


def layer(square: str = SQUARE, unit: str = BY_ROOT, head: str = BOTH) -> str:
    return f"""{head}
        %a: {ONE} = aten.mean.dim(self=%x, dim=[2], keepdim=True)
        %c: {WHOLE} = aten.sub.Tensor(self=%x, other=%a)
        %p: {WHOLE} = {square}
        %v: {ONE} = aten.mean.dim(self=%p, dim=[2], keepdim=True)
        %e: {ONE} = aten.add.Tensor(self=%v, other=1e-06)
        {unit}
        %s: {WHOLE} = aten.mul.Tensor(self=%u, other=%w)
        %n: {WHOLE} = aten.add.Tensor(self=%s, other=%b)
        output y = %n"""


LAYER = (
    f"{BOTH}%n: {WHOLE} = aten.layer_norm.default(input=%x, normalized_shape=[8], weight=%w, bias=%b, eps=1e-06)\n"
    "output y = %n"
)
RESIDUAL = BOTH.replace("weight %w", f"input %residual: {WHOLE}\nweight %w")
RESIDUAL_ONLY = f"{X}input %residual: {WHOLE}\n"


def summed(norm: str, head: str = RESIDUAL, add: str = "self=%x, other=%residual") -> str:
    return f"{head}%s: {WHOLE} = aten.add.Tensor({add})\n%n: {WHOLE} = aten.{norm}\noutput y = %n"


def fused(norm: str, head: str = RESIDUAL) -> str:
    return f"{head}%n: {WHOLE}, %s: {WHOLE} = graphopt.{norm}\noutput y = %n"


LAYER_ARGS = "normalized_shape=[8], weight=%w, bias=%b, eps=1e-06"
RMS_ARGS = "normalized_shape=[8], weight=%w, eps=1e-06"
WITHOUT_BIAS = RESIDUAL.replace("weight %b: f32[8]\n", "")
SUM = "x=%x, residual=%residual"

CASES = [
    Case("rms, power", FuseRmsNorm(), rms(), RMS),
    Case("rms, product", FuseRmsNorm(), rms(PRODUCT), RMS),
    Case("rms, weight last", FuseRmsNorm(), rms(last="self=%u, other=%w"), RMS),
    Case("layer, root", FuseLayerNorm(), layer(), LAYER),
    Case("layer, inverse root", FuseLayerNorm(), layer(unit=BY_INVERSE), LAYER),
    Case("layer, product", FuseLayerNorm(), layer(CENTRED_PRODUCT), LAYER),
    Case("layer, product, inverse root", FuseLayerNorm(), layer(CENTRED_PRODUCT, BY_INVERSE), LAYER),
    Case(
        "add layer",
        FuseAddLayerNorm(),
        summed(f"layer_norm.default(input=%s, {LAYER_ARGS})"),
        fused(f"add_layer_norm.default({SUM}, {LAYER_ARGS})"),
    ),
    Case(
        "add layer, sum lives on",
        FuseAddLayerNorm(),
        summed(f"layer_norm.default(input=%s, {LAYER_ARGS})") + "\noutput s = %s",
        fused(f"add_layer_norm.default({SUM}, {LAYER_ARGS})") + "\noutput s = %s",
    ),
    Case(
        "add layer, nothing else",
        FuseAddLayerNorm(),
        summed("layer_norm.default(input=%s, normalized_shape=[8])", RESIDUAL_ONLY),
        fused(f"add_layer_norm.default({SUM}, normalized_shape=[8])", RESIDUAL_ONLY),
    ),
    Case(
        "add rms",
        FuseAddRmsNorm(),
        summed(f"rms_norm.default(input=%s, {RMS_ARGS})", WITHOUT_BIAS),
        fused(f"add_rms_norm.default({SUM}, {RMS_ARGS})", WITHOUT_BIAS),
    ),
    Case(
        "add rms, nothing else",
        FuseAddRmsNorm(),
        summed("rms_norm.default(input=%s, normalized_shape=[8])", RESIDUAL_ONLY) + "\noutput s = %s",
        fused(f"add_rms_norm.default({SUM}, normalized_shape=[8])", RESIDUAL_ONLY) + "\noutput s = %s",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fires(case: Case) -> None:
    assert_fires(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equal(case: Case) -> None:
    assert_equal(case)


def test_computes_torch_norms() -> None:
    def layer_norm(x: Tensor, w: Tensor, b: Tensor, residual: Tensor | None = None) -> Tensor:
        total = x if residual is None else x + residual
        return functional.layer_norm(total, (8,), w, b, 1e-6)

    def rms_norm(x: Tensor, w: Tensor) -> Tensor:
        return w * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    assert_computes(program(layer()), layer_norm)
    assert_computes(program(fused(f"add_layer_norm.default({SUM}, {LAYER_ARGS})")), layer_norm)
    assert_computes(program(RMS), rms_norm)


def other_axis(body: str) -> str:
    """Everything normalized over the sequence."""
    return body.replace("dim=[2]", "dim=[1]").replace(ONE, "f32[batch, 1, 8]")


OTHER_AXIS = "it does not normalize over the last axis"
DYNAMIC = (
    DIMS + "dim width in [1, ...]\ninput %x: f32[batch, sequence, width]\ninput %w: f32[width]\ninput %b: f32[width]\n"
)


def dynamic(body: str, head: str) -> str:
    return DYNAMIC + body.removeprefix(head).replace(WHOLE, "f32[batch, sequence, width]")


def wide(name: str, head: str) -> str:
    return head.replace(f"weight %{name}: f32[8]", f"weight %{name}: f32[1, 8]")


NOT_A_VECTOR = "f32[1, 8], not one number for each feature"


@pytest.mark.parametrize(
    ("rule", "body", "reason"),
    [
        (FuseRmsNorm(), other_axis(rms()), OTHER_AXIS),
        (FuseLayerNorm(), other_axis(layer()), OTHER_AXIS),
        (FuseRmsNorm(), dynamic(rms(), WEIGHT), "the normalized size is dynamic"),
        (FuseLayerNorm(), dynamic(layer(), BOTH), "the normalized size is dynamic"),
        (FuseRmsNorm(), rms(head=wide("w", WEIGHT)), f"weight is {NOT_A_VECTOR}"),
        (FuseLayerNorm(), layer(head=wide("w", BOTH)), f"weight is {NOT_A_VECTOR}"),
        (FuseLayerNorm(), layer(head=wide("b", BOTH)), f"bias is {NOT_A_VECTOR}"),
        (
            FuseRmsNorm(),
            rms(head=WEIGHT.replace("%w: f32", "%w: f64")).replace("%n: f32", "%n: f64"),
            "weight and input differ in dtype",
        ),
        (
            FuseAddLayerNorm(),
            summed(f"layer_norm.default(input=%s, {LAYER_ARGS})", RESIDUAL.replace(f"residual: {WHOLE}", "residual: f32[8]")),
            "the summands differ in type: f32[batch, sequence, 8] and f32[8]",
        ),
        (
            FuseAddRmsNorm(),
            summed(f"rms_norm.default(input=%s, {RMS_ARGS})", WITHOUT_BIAS.replace(f"residual: {WHOLE}", "residual: f32[8]")),
            "the summands differ in type: f32[batch, sequence, 8] and f32[8]",
        ),
    ],
)  # fmt: skip
def test_refuses(rule: Rule, body: str, reason: str) -> None:
    assert_refuses(body, rule, reason)


SQUARES = f"{X}input %residual: {WHOLE}\n".replace("sequence, 8", "5, 8").replace("dim sequence in [1, ...]\n", "")


@pytest.mark.parametrize(("rule", "norm"), [(FuseAddLayerNorm(), "layer_norm"), (FuseAddRmsNorm(), "rms_norm")])
def test_refuses_several_axes(rule: Rule, norm: str) -> None:
    body = summed(f"{norm}.default(input=%s, normalized_shape=[5, 8])", SQUARES).replace("sequence, 8", "5, 8")
    assert_refuses(body, rule, "it normalizes over several axes")


@pytest.mark.parametrize(("rule", "norm"), [(FuseAddLayerNorm(), "layer_norm"), (FuseAddRmsNorm(), "rms_norm")])
def test_refuses_a_weight_that_comes_too_late(rule: Rule, norm: str) -> None:
    """Others may read the sum before the weight is there."""
    body = f"""{RESIDUAL_ONLY}
        input %g: f32[8]
        %s: {WHOLE} = aten.add.Tensor(self=%x, other=%residual)
        %h: f32[8] = aten.exp.default(self=%g)
        %n: {WHOLE} = aten.{norm}.default(input=%s, normalized_shape=[8], weight=%h)
        output y = %n"""
    assert_refuses(body, rule, "weight is computed after %s")


@pytest.mark.parametrize(
    ("rule", "body", "value", "op"),
    [
        (FuseRmsNorm(), rms(), "%r", "rsqrt.default"),
        (FuseRmsNorm(), rms(), "%u", "mul.Tensor"),
        (FuseLayerNorm(), layer(), "%c", "sub.Tensor"),
        (FuseLayerNorm(), layer(), "%a", "mean.dim"),
    ],
)
def test_refuses_values_that_escape(rule: Rule, body: str, value: str, op: str) -> None:
    reason = f"{value} (aten.{op}) is also used by an output"
    assert_refuses(f"{body}\noutput z = {value}", rule, reason)


@pytest.mark.parametrize(
    ("rule", "body"),
    [
        (FuseRmsNorm(), rms(POWER.replace("=2", "=3"))),
        (FuseRmsNorm(), rms().replace("other=1e-06)", "other=1e-06, alpha=2)")),
        (FuseLayerNorm(), layer(unit=BY_ROOT.replace("sqrt", "abs"))),
        (FuseAddLayerNorm(), summed(f"layer_norm.default(input=%s, {LAYER_ARGS})", add="self=%x, other=%residual, alpha=2")),
        (FuseAddLayerNorm(), summed(f"layer_norm.default(input=%s, {LAYER_ARGS})", add="self=%x, other=1.5")),
    ],
)  # fmt: skip
def test_does_not_match(rule: Rule, body: str) -> None:
    assert_not_matched(body, rule)


@pytest.mark.parametrize("name", ["w", "b"])
def test_a_layer_norm_of_mixed_precision_is_no_crash(name: str) -> None:
    body = layer(head=BOTH.replace(f"%{name}: f32", f"%{name}: f64")).replace("%n: f32", "%n: f64")
    body = body.replace("%s: f32", "%s: f64") if name == "w" else body
    assert_equal_runs(program(body), apply(body, FuseLayerNorm()).text)


# The pass


EAGER = rms().replace(f"input %x: {WHOLE}", f"input %given: {WHOLE}\ninput %residual: {WHOLE}").replace(
    "%p:", f"%x: {WHOLE} = aten.add.Tensor(self=%given, other=%residual)\n%p:", 1
)  # fmt: skip


def test_a_norm_takes_its_sum_along() -> None:
    applied = apply_pass(EAGER, FuseNorm())
    args = f"x=%given, residual=%residual, {RMS_ARGS}"
    assert applied.text == program(f"""{DIMS}
        input %given: {WHOLE}
        input %residual: {WHOLE}
        weight %w: f32[8]
        %n: {WHOLE}, %x: {WHOLE} = graphopt.add_rms_norm.default({args})
        output y = %n""")
    assert applied.matches == {"FuseRmsNorm": 1, "FuseAddRmsNorm": 1}
    assert_equal_runs(program(EAGER), applied.text)


def test_without_residual_the_sum_stays() -> None:
    applied = apply_pass(EAGER, FuseNorm(residual=False))
    assert applied.matches == {"FuseRmsNorm": 1}
    assert "aten.add.Tensor(self=%given, other=%residual)" in applied.text
    assert f"aten.rms_norm.default(input=%x, {RMS_ARGS})" in applied.text


def test_a_sum_with_two_norms_is_fused_into_the_first() -> None:
    body = summed("layer_norm.default(input=%s, normalized_shape=[8])", RESIDUAL_ONLY)
    body += f"\n%m: {WHOLE} = aten.rms_norm.default(input=%s, normalized_shape=[8])\noutput z = %m"
    body = body.replace("output y = %n\n", "") + "\noutput y = %n"
    applied = apply_pass(body, FuseNorm())
    assert applied.text == program(f"""{RESIDUAL_ONLY}
        %n: {WHOLE}, %s: {WHOLE} = graphopt.add_layer_norm.default({SUM}, normalized_shape=[8])
        %m: {WHOLE} = aten.rms_norm.default(input=%s, normalized_shape=[8])
        output z = %m
        output y = %n""")
    assert_equal_runs(program(body), applied.text)


@pytest.mark.parametrize("body", [EAGER, *(case.before for case in CASES)])
def test_idempotent(body: str) -> None:
    assert_idempotent(body, FuseNorm())


def test_nothing_to_fuse_is_an_error_with_its_reason() -> None:
    with pytest.raises(NoMatchError, match=f"fuse_norm changed nothing .FuseRmsNorm: {OTHER_AXIS}"):
        apply_pass(other_axis(rms()), FuseNorm())
