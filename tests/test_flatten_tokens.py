"""flatten_tokens: linears and what lies between them on ``[tokens, features]``."""

from __future__ import annotations

import pytest

from graphopt.errors import NoMatchError
from graphopt.passes.flatten_tokens import (
    ADD_NORMS,
    BINARY,
    NORMS,
    UNARY,
    FlattenAddNorm,
    FlattenBinary,
    FlattenChunks,
    FlattenLinear,
    FlattenTokens,
    FlattenUnary,
)
from graphopt.passes.moves import MergeReshapes
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
    assert_refuses,
    program,
)

T = "f32[batch, sequence, 8]"
F = "f32[batch*sequence, 8]"
DOWN = "shape=[batch*sequence, 8]"
UP = "shape=[batch, sequence, 8]"
WEIGHTS = "weight %w: f32[6, 8]\nweight %b: f32[6]\n"

LINEAR = f"""{DIMS}input %x: {T}
    {WEIGHTS}
    %y: f32[batch, sequence, 6] = aten.linear.default(input=%x, weight=%w, bias=%b)
    output y = %y"""
FLAT_LINEAR = f"""{DIMS}input %x: {T}
    {WEIGHTS}
    %reshape: {F} = aten.reshape.default(self=%x, {DOWN})
    %linear: f32[batch*sequence, 6] = aten.linear.default(input=%reshape, weight=%w, bias=%b)
    %y: f32[batch, sequence, 6] = aten.reshape.default(self=%linear, shape=[batch, sequence, 6])
    output y = %y"""

#: ``f`` is flat; the input ``ids`` is there to name the sizes.
HEAD = f"{DIMS}input %ids: i64[batch, sequence]\ninput %f: {F}\ninput %x: {T}\ninput %w: f32[8]\n"
SPLIT = f"%s: {T} = aten.reshape.default(self=%f, {UP})\n"


def full(path: str) -> str:
    return (
        f"{path}.default"
        if path.startswith("graphopt.")
        else f"aten.{path}.{'Tensor' if path in BINARY else 'default'}"
    )


def short(path: str) -> str:
    return path.removeprefix("graphopt.")


def unary(path: str, args: str = "", head: str = HEAD) -> str:
    name = "x" if path == "graphopt.quick_gelu" else "input" if path in NORMS else "self"
    return f"{head}{SPLIT}%y: {T} = {full(path)}({name}=%s{args})\noutput y = %y"


def flat_unary(path: str, args: str = "") -> str:
    name = "x" if path == "graphopt.quick_gelu" else "input" if path in NORMS else "self"
    return f"""{HEAD}
        %{short(path)}: {F} = {full(path)}({name}=%f{args})
        %y: {T} = aten.reshape.default(self=%{short(path)}, {UP})
        output y = %y"""


def operands(path: str, first: str, second: str) -> str:
    return f"gate={first}, up={second}" if path.startswith("graphopt.") else f"self={first}, other={second}"


def rest(path: str) -> str:
    return ', activation="silu"' if path.startswith("graphopt.") else ""


def binary(path: str, first: str, second: str, head: str = HEAD, more: str = "") -> str:
    return f"{head}{SPLIT}%y: {T} = {full(path)}({operands(path, first, second)}{rest(path)}{more})\noutput y = %y"


def flat_binary(path: str, first: str, second: str, more: str = "") -> str:
    return f"""{HEAD}
        %reshape: {F} = aten.reshape.default(self=%x, {DOWN})
        %{short(path)}: {F} = {full(path)}({operands(path, first, second)}{rest(path)}{more})
        %y: {T} = aten.reshape.default(self=%{short(path)}, {UP})
        output y = %y"""


def add_norm(path: str, x: str, residual: str, args: str = ", weight=%w") -> str:
    call = f"{path}.default(x={x}, residual={residual}, normalized_shape=[8]{args})"
    return f"{HEAD}{SPLIT}%y: {T}, %z: {T} = {call}\noutput y = %y\noutput z = %z"


def flat_add_norm(path: str, x: str, residual: str) -> str:
    name = short(path)
    return f"""{HEAD}
        %reshape: {F} = aten.reshape.default(self=%x, {DOWN})
        %{name}: {F}, %{name}_1: {F} = {path}.default(x={x}, residual={residual}, normalized_shape=[8], weight=%w)
        %y: {T} = aten.reshape.default(self=%{name}, {UP})
        %z: {T} = aten.reshape.default(self=%{name}_1, {UP})
        output y = %y
        output z = %z"""


WIDTHS = {2: (4, 4), 3: (3, 3, 2)}


def chunks(count: int, dim: int = 2) -> str:
    results = ", ".join(f"%y{index}: f32[batch, sequence, {width}]" for index, width in enumerate(WIDTHS[count]))
    ends = "\n".join(f"output y{index} = %y{index}" for index in range(count))
    return f"{HEAD}{SPLIT}{results} = aten.chunk.default(self=%s, chunks={count}, dim={dim})\n{ends}"


def flat_chunks(count: int) -> str:
    names = ["chunk", "chunk_1", "chunk_2"]
    parts = ", ".join(f"%{name}: f32[batch*sequence, {w}]" for name, w in zip(names, WIDTHS[count], strict=False))
    lines = [f"{HEAD}{parts} = aten.chunk.default(self=%f, chunks={count}, dim=1)"]
    for index, width in enumerate(WIDTHS[count]):
        shape = f"[batch, sequence, {width}]"
        lines.append(f"%y{index}: f32{shape} = aten.reshape.default(self=%{names[index]}, shape={shape})")
    return "\n".join([*lines, *(f"output y{index} = %y{index}" for index in range(count))])


NORM_ARGS = ", normalized_shape=[8], weight=%w"
CASES = [
    Case("linear", FlattenLinear(), LINEAR, FLAT_LINEAR),
    Case("linear without bias", FlattenLinear(), *(
        text.replace(", bias=%b", "").replace("weight %b: f32[6]\n", "") for text in (LINEAR, FLAT_LINEAR))),
    *(Case(path, FlattenUnary(), unary(path), flat_unary(path)) for path in UNARY),
    *(Case(path, FlattenUnary(), unary(path, NORM_ARGS), flat_unary(path, NORM_ARGS)) for path in NORMS),
    Case("halves", FlattenChunks(2), chunks(2), flat_chunks(2)),
    Case("halves, from the end", FlattenChunks(2), chunks(2, -1), flat_chunks(2)),
    Case("thirds", FlattenChunks(3), chunks(3), flat_chunks(3)),
    Case("gelu tanh", FlattenUnary(), unary("gelu", ', approximate="tanh"'), flat_unary("gelu", ', approximate="tanh"')),
    *(Case(f"{path}, first", FlattenBinary(), binary(path, "%s", "%x"), flat_binary(path, "%f", "%reshape")) for path in BINARY),
    Case("gated, second", FlattenBinary(), binary("graphopt.gated_activation", "%x", "%s"),
         flat_binary("graphopt.gated_activation", "%reshape", "%f")),
    Case("add with alpha, first", FlattenBinary(), binary("add", "%s", "%x", more=", alpha=3"),
         flat_binary("add", "%f", "%reshape", ", alpha=3")),
    *(Case(f"{path}, first", FlattenAddNorm(path, 0), add_norm(path, "%s", "%x"), flat_add_norm(path, "%f", "%reshape"))
      for path in ADD_NORMS),
    *(Case(f"{path}, second", FlattenAddNorm(path, 1), add_norm(path, "%x", "%s"), flat_add_norm(path, "%reshape", "%f"))
      for path in ADD_NORMS),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fires(case: Case) -> None:
    assert_fires(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equal(case: Case) -> None:
    assert_equal(case)


@pytest.mark.parametrize("path", ["add", "mul"])
def test_a_second_operand_is_flattened_too(path: str) -> None:
    body = binary(path, "%x", "%s")
    applied = apply(body, FlattenBinary())
    assert applied.matches == {"FlattenBinary": 1}
    assert f"{full(path)}(" in applied.text
    assert_equal_runs(program(body), applied.text)


def test_a_second_operand_keeps_its_factor() -> None:
    body = binary("add", "%x", "%s", more=", alpha=3")
    assert_equal_runs(program(body), apply(body, FlattenBinary()).text)


OTHER_TYPE = "the operands differ in type"
NARROW = HEAD.replace(f"input %x: {T}", "input %x: f32[8]")


@pytest.mark.parametrize(
    ("rule", "body"),
    [
        (FlattenBinary(), binary("add", "%s", "%x", NARROW)),
        (FlattenBinary(), binary("mul", "%s", "%x", NARROW)),
    ],
)
def test_refuses_operands_that_differ(rule: Rule, body: str) -> None:
    assert_refuses(body, rule, OTHER_TYPE)


BROADCAST = f"""
    dim batch in [1, ...]
    dim sequence in [1, ...]
    input %x: {T}
    input %f: f32[sequence, 8]
    %s: f32[1, sequence, 8] = aten.reshape.default(self=%f, shape=[1, sequence, 8])
"""


@pytest.mark.parametrize("args", ["self=%s, other=%x", "self=%x, other=%s"])
def test_refuses_a_split_that_is_broadcast(args: str) -> None:
    """Positions that are added to every sequence of the batch."""
    assert_refuses(f"{BROADCAST}%y: {T} = aten.add.Tensor({args})\noutput y = %y", FlattenBinary(), OTHER_TYPE)


@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_over_several_axes_is_no_crash(norm: str) -> None:
    body = f"""
        dim batch in [1, ...]
        input %ids: i64[batch]
        input %f: f32[4*batch, 8]
        %s: f32[batch, 4, 8] = aten.reshape.default(self=%f, shape=[batch, 4, 8])
        %y: f32[batch, 4, 8] = aten.{norm}.default(input=%s, normalized_shape=[4, 8])
        output y = %y"""
    assert_equal_runs(program(body), apply(body, FlattenUnary()).text)


OTHER_FEATURES = HEAD.replace(f"input %f: {F}", "input %f: f32[2*batch*sequence, 4]")
NOT_FLAT = HEAD.replace(f"input %f: {F}", "input %f: f32[sequence, batch, 8]")


#: Parts of a sequence.
FIXED = """
    dim batch in [1, ...]
    input %ids: i64[batch]
    input %f: f32[4*batch, 8]
    %s: f32[batch, 4, 8] = aten.reshape.default(self=%f, shape=[batch, 4, 8])
    %a: f32[batch, 2, 8], %b: f32[batch, 2, 8] = aten.chunk.default(self=%s, chunks=2, dim=1)
    output a = %a
    output b = %b"""


#: Three chunks of four features are two.
FEWER = f"""{DIMS}input %ids: i64[batch, sequence]
    input %f: f32[batch*sequence, 4]
    %s: f32[batch, sequence, 4] = aten.reshape.default(self=%f, shape=[batch, sequence, 4])
    %a: f32[batch, sequence, 2], %b: f32[batch, sequence, 2] = aten.chunk.default(self=%s, chunks=3, dim=2)
    output a = %a
    output b = %b"""


@pytest.mark.parametrize(
    ("rule", "body"),
    [
        (FlattenLinear(), FLAT_LINEAR),
        (FlattenUnary(), unary("gelu", head=OTHER_FEATURES)),
        (FlattenUnary(), unary("gelu", head=NOT_FLAT)),
        (FlattenBinary(), binary("add", "%s", "%x", OTHER_FEATURES)),
        (FlattenBinary(), binary("add", "%s", "2.0")),
        (FlattenUnary(), f"{HEAD}{SPLIT}%y: {T} = aten.softmax.int(self=%s, dim=1)\noutput y = %y"),
        (FlattenChunks(2), chunks(3)),
        (FlattenChunks(2), FIXED),
        (FlattenChunks(3), FEWER),
        (FlattenAddNorm(ADD_NORMS[0], 0), add_norm(ADD_NORMS[0], "%x", "%s")),
        (FlattenAddNorm(ADD_NORMS[0], 1), add_norm(ADD_NORMS[0], "%s", "%x")),
        (FlattenAddNorm(ADD_NORMS[1], 0), add_norm(ADD_NORMS[0], "%s", "%x")),
    ],
)
def test_does_not_match(rule: Rule, body: str) -> None:
    assert_not_matched(body, rule)


# The pass


LAYER = f"""{DIMS}
    input %x: {T}
    weight %w: f32[8, 8]
    weight %g: f32[8]
    %l: {T} = aten.linear.default(input=%x, weight=%w)
    %a: {T} = aten.gelu.default(self=%l)
    %r: {T} = aten.add.Tensor(self=%a, other=%x)
    %n: {T}, %s: {T} = graphopt.add_layer_norm.default(x=%x, residual=%r, normalized_shape=[8], weight=%g)
    %m: {T} = aten.linear.default(input=%n, weight=%w)
    output y = %m
    output s = %s
"""


def test_reshapes_are_left_at_the_ends_only() -> None:
    applied = apply_pass(LAYER, FlattenTokens())
    norm = "graphopt.add_layer_norm.default(x=%reshape, residual=%add, normalized_shape=[8], weight=%g)"
    assert applied.text == program(f"""{LAYER.split("%l:", maxsplit=1)[0]}
        %reshape: {F} = aten.reshape.default(self=%x, {DOWN})
        %linear: {F} = aten.linear.default(input=%reshape, weight=%w)
        %gelu: {F} = aten.gelu.default(self=%linear)
        %add: {F} = aten.add.Tensor(self=%gelu, other=%reshape)
        %add_layer_norm: {F}, %add_layer_norm_1: {F} = {norm}
        %s: {T} = aten.reshape.default(self=%add_layer_norm_1, {UP})
        %linear_1: {F} = aten.linear.default(input=%add_layer_norm, weight=%w)
        %m: {T} = aten.reshape.default(self=%linear_1, {UP})
        output y = %m
        output s = %s""")
    assert applied.matches == {
        "FlattenLinear": 2, "FlattenUnary": 1, "FlattenBinary": 1, "FlattenAddNorm": 1, "MergeReshapes": 1,
    }  # fmt: skip
    assert_equal_runs(program(LAYER), applied.text)


def test_linears_of_one_input_share_its_reshape() -> None:
    body = f"""{DIMS}
        input %x: {T}
        weight %w: f32[8, 8]
        %a: {T} = aten.linear.default(input=%x, weight=%w)
        %b: {T} = aten.linear.default(input=%x, weight=%w)
        output a = %a
        output b = %b"""
    applied = apply_pass(body, FlattenTokens())
    assert applied.text.count(DOWN) == 1
    assert_equal_runs(program(body), applied.text)


@pytest.mark.parametrize("body", [LAYER, *(case.before for case in CASES)])
def test_idempotent(body: str) -> None:
    assert_idempotent(body, FlattenTokens())


def test_rules_of_the_pass() -> None:
    kinds = [type(rule) for rule in FlattenTokens().rules()]
    assert kinds == [
        FlattenLinear,
        FlattenUnary,
        FlattenBinary,
        *[FlattenChunks] * 2,
        *[FlattenAddNorm] * 4,
        MergeReshapes,
    ]


def test_nothing_to_flatten_is_an_error() -> None:
    with pytest.raises(NoMatchError, match="flatten_tokens changed nothing"):
        apply_pass(f"{DIMS}input %x: {T}\n%y: {T} = aten.gelu.default(self=%x)\noutput y = %y", FlattenTokens())
