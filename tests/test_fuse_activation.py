"""fuse_activation: GELU, SiLU and gated units as one op each."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from graphopt.errors import NoMatchError
from graphopt.passes.fuse_activation import (
    FuseActivation,
    FuseGated,
    FuseGeluErf,
    FuseGeluTanh,
    FuseQuickGelu,
    FuseSilu,
)
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

T = "f32[batch, sequence, 8]"
X = f"{DIMS}input %x: {T}\n"
GATED = f"{X}input %up: {T}\n"


def body(*lines: str, head: str = X) -> str:
    """A graph from lines ``name = op(args)``; the last is the output."""
    written = [f"%{line.replace(' = ', f': {T} = aten.', 1)}" for line in lines]
    return "\n".join([head, *written, f"output y = %{lines[-1].split(' ', maxsplit=1)[0]}"])


ERF = {
    "divided": "h = div.Tensor(self=%x, other=1.4142135623730951)",
    "multiplied": "h = mul.Tensor(self=%x, other=0.7071067811865476)",
}
HALF_OF = {
    "half x": ("a = mul.Tensor(self=%x, other=0.5)", "y = mul.Tensor(self=%a, other=%o)"),
    "half x, swapped": ("a = mul.Tensor(self=%x, other=0.5)", "y = mul.Tensor(self=%o, other=%a)"),
    "half factor": ("a = mul.Tensor(self=%o, other=0.5)", "y = mul.Tensor(self=%x, other=%a)"),
    "half product": ("a = mul.Tensor(self=%x, other=%o)", "y = mul.Tensor(self=%a, other=0.5)"),
}
ROOT = f"other={math.sqrt(2 / math.pi)}"
TANH = {
    "cubic": (
        "p = pow.Tensor_Scalar(self=%x, exponent=3.0)",
        "m = mul.Tensor(self=%p, other=0.044715)",
        "s = add.Tensor(self=%x, other=%m)",
        f"i = mul.Tensor(self=%s, {ROOT})",
    ),
    "factored": (
        "p = mul.Tensor(self=%x, other=%x)",
        "m = mul.Tensor(self=%p, other=0.044715)",
        "s = add.Tensor(self=%m, other=1)",
        f"r = mul.Tensor(self=%x, {ROOT})",
        "i = mul.Tensor(self=%r, other=%s)",
    ),
    "nested": (
        "p = mul.Tensor(self=%x, other=0.044715)",
        "m = mul.Tensor(self=%p, other=%x)",
        "s = add.Tensor(self=%m, other=1.0)",
        f"r = mul.Tensor(self=%x, {ROOT})",
        "i = mul.Tensor(self=%r, other=%s)",
    ),
}


def gelu_erf(inner: str = "divided", half: str = "half x") -> str:
    return body(ERF[inner], "e = erf.default(self=%h)", "o = add.Tensor(self=%e, other=1.0)", *HALF_OF[half])


def gelu_tanh(inner: str = "cubic", half: str = "half x") -> str:
    return body(*TANH[inner], "t = tanh.default(self=%i)", "o = add.Tensor(self=%t, other=1.0)", *HALF_OF[half])


SILU = body("s = sigmoid.default(self=%x)", "y = mul.Tensor(self=%x, other=%s)")
QUICK = body(
    "a = mul.Tensor(self=%x, other=1.702)", "s = sigmoid.default(self=%a)", "y = mul.Tensor(self=%x, other=%s)"
)
ACTIVATIONS = {
    "silu": "g = silu.default(self=%x)",
    "gelu": "g = gelu.default(self=%x)",
    "gelu_tanh": 'g = gelu.default(self=%x, approximate="tanh")',
}


def gated(activation: str, product: str = "self=%g, other=%up", head: str = GATED) -> str:
    return body(ACTIVATIONS[activation], f"y = mul.Tensor({product})", head=head)


def unit(activation: str) -> str:
    return (
        f'{GATED}%y: {T} = graphopt.gated_activation.default(gate=%x, up=%up, activation="{activation}")\noutput y = %y'
    )


CASES = [
    *(
        Case(f"erf, {inner}, {half}", FuseGeluErf(), gelu_erf(inner, half), body("y = gelu.default(self=%x)"))
        for inner, half in itertools.product(ERF, HALF_OF)
    ),
    *(
        Case(
            f"tanh, {inner}, {half}",
            FuseGeluTanh(),
            gelu_tanh(inner, half),
            body('y = gelu.default(self=%x, approximate="tanh")'),
        )
        for inner, half in itertools.product(TANH, HALF_OF)
    ),
    Case("silu", FuseSilu(), SILU, body("y = silu.default(self=%x)")),
    Case("silu, swapped", FuseSilu(), SILU.replace("self=%x, other=%s", "self=%s, other=%x"), body("y = silu.default(self=%x)")),
    Case("quick", FuseQuickGelu(), QUICK, f"{X}%y: {T} = graphopt.quick_gelu.default(x=%x)\noutput y = %y"),
    Case(
        "quick, another alpha",
        FuseQuickGelu(),
        QUICK.replace("1.702", "2"),
        f"{X}%y: {T} = graphopt.quick_gelu.default(x=%x, alpha=2.0)\noutput y = %y",
    ),
    *(Case(f"gated {name}", FuseGated(), gated(name), unit(name)) for name in ACTIVATIONS),
    Case("gated, swapped", FuseGated(), gated("silu", "self=%up, other=%g"), unit("silu")),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fires(case: Case) -> None:
    assert_fires(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equal(case: Case) -> None:
    assert_equal(case)


def test_computes_torch_activations() -> None:
    def swiglu(x: Tensor, up: Tensor) -> Tensor:
        return functional.silu(x) * up

    assert_computes(program(gelu_erf()), functional.gelu)
    assert_computes(program(gelu_tanh()), lambda x: functional.gelu(x, approximate="tanh"))
    assert_computes(program(unit("silu")), swiglu)
    assert_computes(program(unit("gelu_tanh")), lambda x, up: functional.gelu(x, approximate="tanh") * up)
    assert_computes(apply(QUICK, FuseQuickGelu()).text, lambda x: x * torch.sigmoid(1.702 * x))


@pytest.mark.parametrize(
    ("rule", "lines", "value", "op"),
    [
        (FuseGeluErf(), gelu_erf(), "%e", "erf.default"),
        (FuseGeluErf(), gelu_erf(), "%a", "mul.Tensor"),
        (FuseGeluTanh(), gelu_tanh(), "%t", "tanh.default"),
        (FuseGeluTanh(), gelu_tanh("nested"), "%r", "mul.Tensor"),
        (FuseSilu(), SILU, "%s", "sigmoid.default"),
        (FuseQuickGelu(), QUICK, "%s", "sigmoid.default"),
        (FuseQuickGelu(), QUICK, "%a", "mul.Tensor"),
        (FuseGated(), gated("silu"), "%g", "silu.default"),
        (FuseGated(), gated("gelu_tanh"), "%g", "gelu.default"),
    ],
)
def test_refuses_values_that_escape(rule: Rule, lines: str, value: str, op: str) -> None:
    assert_refuses(f"{lines}\noutput z = {value}", rule, f"{value} (aten.{op}) is also used by an output")


def test_a_gate_of_another_type_is_refused() -> None:
    head = GATED.replace(f"%up: {T}", "%up: f32[8]")
    reason = "gate and up differ in type: f32[batch, sequence, 8] and f32[8]"
    assert_refuses(gated("silu", head=head), FuseGated(), reason)


@pytest.mark.parametrize(
    ("rule", "lines"),
    [
        (FuseGeluErf(), gelu_erf().replace("1.4142135623730951", "1.41421")),
        (FuseGeluErf(), gelu_erf().replace("other=0.5", "other=0.25")),
        (FuseGeluErf(), gelu_erf().replace("other=1.0)", "other=1.0, alpha=2)")),
        (FuseGeluErf(), gelu_erf().replace("self=%x, other=0.5", "self=%h, other=0.5")),
        (FuseGeluTanh(), gelu_tanh().replace("0.044715", "0.0447")),
        (FuseGeluTanh(), gelu_tanh().replace("exponent=3.0", "exponent=2.0")),
        (FuseSilu(), QUICK),
        (FuseSilu(), body("s = sigmoid.default(self=%up)", "y = mul.Tensor(self=%x, other=%s)", head=GATED)),
        (FuseQuickGelu(), SILU),
        (FuseGated(), body("g = relu.default(self=%x)", "y = mul.Tensor(self=%g, other=%up)", head=GATED)),
        (FuseGated(), body(ACTIVATIONS["silu"], "y = mul.Tensor(self=%g, other=2.0)")),
        (FuseGated(), body(ACTIVATIONS["silu"], "y = add.Tensor(self=%g, other=%up)", head=GATED)),
    ],
)
def test_does_not_match(rule: Rule, lines: str) -> None:
    assert_not_matched(lines, rule)


def test_a_cubic_term_that_is_scaled_twice_is_no_gelu() -> None:
    lines = body(
        "p = mul.Tensor(self=%x, other=0.044715)",
        "m = mul.Tensor(self=%p, other=%x)",
        "n = mul.Tensor(self=%m, other=0.044715)",
        "s = add.Tensor(self=%n, other=1.0)",
        f"r = mul.Tensor(self=%x, {ROOT})",
        "i = mul.Tensor(self=%r, other=%s)",
        "t = tanh.default(self=%i)",
        "o = add.Tensor(self=%t, other=1.0)",
        *HALF_OF["half x"],
    )
    assert_equal_runs(program(lines), apply(lines, FuseGeluTanh()).text)


# The pass


SWIGLU = body("s = sigmoid.default(self=%x)", "g = mul.Tensor(self=%x, other=%s)", "y = mul.Tensor(self=%g, other=%up)", head=GATED)  # fmt: skip # noqa: E501


def test_a_gated_unit_from_its_parts() -> None:
    applied = apply_pass(SWIGLU, FuseActivation())
    assert applied.text == program(unit("silu"))
    assert applied.matches == {"FuseSilu": 1, "FuseGated": 1}
    assert_equal_runs(program(SWIGLU), applied.text)


def test_without_gated_the_product_stays() -> None:
    applied = apply_pass(SWIGLU, FuseActivation(gated=False))
    assert applied.text == program(gated("silu"))
    assert applied.matches == {"FuseSilu": 1}


def test_a_unit_gated_by_itself_is_equal() -> None:
    lines = body(ACTIVATIONS["silu"], "y = mul.Tensor(self=%g, other=%g)")
    assert_equal_runs(program(lines), apply_pass(lines, FuseActivation(allow_no_match=True)).text)


@pytest.mark.parametrize("lines", [SWIGLU, *(case.before for case in CASES)])
def test_idempotent(lines: str) -> None:
    assert_idempotent(lines, FuseActivation())


def test_nothing_to_fuse_is_an_error() -> None:
    with pytest.raises(NoMatchError, match="fuse_activation changed nothing"):
        apply_pass(body("y = gelu.default(self=%x)"), FuseActivation())
