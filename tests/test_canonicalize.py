"""canonicalize: no-ops, spellings, constants, equal sub-graphs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from graphopt.errors import NoMatchError
from graphopt.execution import run
from graphopt.ir import Graph
from graphopt.passes.canonicalize import (
    Canonicalize,
    DropAddZero,
    DropAndTrue,
    DropMulOne,
    LinearOfAddmm,
    NumberOperand,
)
from graphopt.pipeline import run_passes
from graphopt.rewrite import Rule
from graphopt.tensors import Weight
from graphopt.text import parse
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
    inputs_of,
    pass_on,
    program,
    read,
    run_text,
)

FLOATS = DIMS + "input %x: f32[batch, sequence, 8]\n"
WHOLE = DIMS + "input %x: i64[batch, sequence, 8]\n"
TRUTHS = DIMS + "input %x: bool[batch, sequence]\n"
SCALED = DIMS + "input %x: f32[batch, sequence, 8]\nweight %c: f32[]\n"

UNCHANGED = FLOATS + "output y = %x"


def unary(call: str, head: str = FLOATS, type: str = "f32[batch, sequence, 8]") -> str:
    """A graph of one call."""
    return f"{head}\n%y: {type} = {call}\noutput y = %y"


def truths(op: str, fill: str) -> str:
    return f"""{TRUTHS}
        %full: bool[batch, sequence] = aten.full.default(size=[batch, sequence], fill_value={fill}, dtype=bool)
        %y: bool[batch, sequence] = aten.{op}.Tensor(self=%x, other=%full)
        output y = %y"""


RESHAPED = f"""{FLOATS}
    %a: f32[batch*sequence, 8] = aten.reshape.default(self=%x, shape=[batch*sequence, 8])
    %b: f32[batch, 2*sequence, 4] = aten.reshape.default(self=%a, shape=[batch, 2*sequence, 4])
    output y = %b"""
MASKED = SCALED.replace("weight", "input %m: bool[batch, sequence, 1]\nweight")
ADDMM = (
    f"{DIMS}input %x: f32[batch*sequence, 8]\ninput %n: f32[batch, sequence]\nweight %w: f32[8, 6]\nweight %b: f32[6]\n"
)
NUMBER = "0.9178138971328735"
MASKED_ONLY = MASKED.replace("weight %c: f32[]\n", "")


CASES = [
    Case("add zero", DropAddZero(), unary("aten.add.Tensor(self=%x, other=0)"), UNCHANGED),
    Case("add zero, alpha", DropAddZero(), unary("aten.add.Tensor(self=%x, other=0.0, alpha=2)"), UNCHANGED),
    Case("subtract zero", DropAddZero(), unary("aten.sub.Tensor(self=%x, other=0)"), UNCHANGED),
    Case("mul one", DropMulOne(), unary("aten.mul.Tensor(self=%x, other=1.0)"), UNCHANGED),
    Case("div one", DropMulOne(), unary("aten.div.Tensor(self=%x, other=1)"), UNCHANGED),
    Case("pow one", DropMulOne(), unary("aten.pow.Tensor_Scalar(self=%x, exponent=1)"), UNCHANGED),
    Case("and true", DropAndTrue(), truths("bitwise_and", "1"), TRUTHS + "output y = %x"),
    Case("and True", DropAndTrue(), truths("bitwise_and", "True"), TRUTHS + "output y = %x"),
    Case("or false", DropAndTrue(), truths("bitwise_or", "0"), TRUTHS + "output y = %x"),
    *(
        Case(
            f"number in {op}",
            NumberOperand(),
            unary(f"aten.{op}.Tensor({args})", SCALED),
            unary(f"aten.{op}.Tensor(self=%x, other={NUMBER})"),
        )
        for op, args in (
            ("mul", "self=%x, other=%c"),
            ("mul", "self=%c, other=%x"),
            ("div", "self=%x, other=%c"),
            ("add", "self=%x, other=%c"),
            ("add", "self=%c, other=%x"),
        )
    ),
    *(
        Case(
            f"number in {before}", NumberOperand(), unary(f"aten.{before}", MASKED), unary(f"aten.{after}", MASKED_ONLY)
        )
        for before, after in (
            (
                "where.self(condition=%m, self=%x, other=%c)",
                f"where.ScalarOther(condition=%m, self=%x, other={NUMBER})",
            ),
            ("where.self(condition=%m, self=%c, other=%x)", f"where.ScalarSelf(condition=%m, self={NUMBER}, other=%x)"),
            ("masked_fill.Tensor(self=%x, mask=%m, value=%c)", f"masked_fill.Scalar(self=%x, mask=%m, value={NUMBER})"),
        )
    ),
    Case(
        "addmm",
        LinearOfAddmm(),
        f"{ADDMM}%y = aten.addmm.default(self=%b, mat1=%x, mat2=%w)\noutput y = %y",
        f"{ADDMM}%transpose = aten.transpose.int(self=%w, dim0=0, dim1=1)\n"
        "%y = aten.linear.default(input=%x, weight=%transpose, bias=%b)\noutput y = %y",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fires(case: Case) -> None:
    assert_fires(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equal(case: Case) -> None:
    assert_equal(case)


WIDER = DIMS + "input %x: f32[8]\ninput %n: f32[batch, sequence]\n"
WIDER_TRUTHS = DIMS + "input %x: bool[sequence]\ninput %n: f32[batch, sequence]\n"
BECOMES_FLOAT = "the result is f32[batch, sequence, 8], not i64[batch, sequence, 8]"


@pytest.mark.parametrize(
    ("rule", "body", "reason"),
    [
        (DropAddZero(), unary("aten.add.Tensor(self=%x, other=0.0)", WHOLE), BECOMES_FLOAT),
        (DropMulOne(), unary("aten.div.Tensor(self=%x, other=1)", WHOLE), BECOMES_FLOAT),
        (DropMulOne(), unary("aten.mul.Tensor(self=%x, other=1.0)", WHOLE), BECOMES_FLOAT),
        (
            DropAndTrue(),
            f"""{WIDER_TRUTHS}
            %full: bool[batch, sequence] = aten.full.default(size=[batch, sequence], fill_value=1, dtype=bool)
            %y: bool[batch, sequence] = aten.bitwise_and.Tensor(self=%x, other=%full)
            output y = %y""",
            "the result is bool[batch, sequence], not bool[sequence]",
        ),
        (
            NumberOperand(),
            unary(
                "aten.mul.Tensor(self=%x, other=%c)",
                DIMS + "input %x: i64[batch, sequence, 8]\nweight %c: f64[]\n",
                "f64[batch, sequence, 8]",
            ),
            "the dtype would change",
        ),
    ],
)
def test_refuses_another_type(rule: Rule, body: str, reason: str) -> None:
    assert_refuses(body, rule, reason)


def addmm(more: str = "") -> str:
    return f"{ADDMM}%y = aten.addmm.default(self=%b, mat1=%x, mat2=%w{more})\noutput y = %y"


@pytest.mark.parametrize(
    ("rule", "body"),
    [
        (DropAddZero(), unary("aten.add.Tensor(self=%x, other=1e-08)")),
        (DropAddZero(), unary("aten.rsub.Scalar(self=%x, other=0)")),
        (DropMulOne(), unary("aten.mul.Tensor(self=%x, other=1.001)")),
        (DropMulOne(), unary('aten.div.Tensor_mode(self=%x, other=1, rounding_mode="floor")')),
        (DropAndTrue(), truths("bitwise_and", "0")),
        (DropAndTrue(), truths("bitwise_or", "1")),
        (
            DropAndTrue(),
            f"""{WHOLE}
            %full: i64[batch, sequence, 8] = aten.full.default(size=[batch, sequence, 8], fill_value=1, dtype=i64)
            %y: i64[batch, sequence, 8] = aten.bitwise_and.Tensor(self=%x, other=%full)
            output y = %y""",
        ),
        (LinearOfAddmm(), addmm().replace("weight %w", "input %w").replace("weight %b", "input %b")),
        (LinearOfAddmm(), addmm(", beta=0.5")),
        (LinearOfAddmm(), addmm(", alpha=2")),
        (LinearOfAddmm(), addmm().replace("%b: f32[6]", "%b: f32[1, 6]")),
        (NumberOperand(), unary("aten.div.Tensor(self=%c, other=%x)", SCALED)),
        (NumberOperand(), unary("aten.add.Tensor(self=%x, other=%c, alpha=2)", SCALED)),
        (NumberOperand(), unary("aten.mul.Tensor(self=%x, other=%c)", FLOATS + "weight %c: f32[1]\n")),
        (NumberOperand(), unary("aten.mul.Tensor(self=%x, other=%c)", FLOATS + "input %c: f32[]\n")),
        (
            NumberOperand(),
            unary("aten.where.self(condition=%m, self=%x, other=%c)", MASKED.replace("c: f32[]", "c: f32[1]")),
        ),
    ],
)
def test_does_not_match(rule: Rule, body: str) -> None:
    assert_not_matched(body, rule)


# Spellings


@pytest.mark.parametrize(
    ("spelling", "normal"),
    [
        ("aten.dropout.default(input=%x, p=0.5, train=False)", None),
        ("aten.to.dtype(self=%x, dtype=f32)", None),
        ("aten.clone.default(self=%x)", None),
        ("aten.contiguous.default(self=%x)", None),
        ("aten.slice.Tensor(self=%x, dim=1)", None),
        ("aten.view.default(self=%x, size=[batch, -1, 8])", None),
        ("aten.expand.default(self=%x, size=[-1, -1, -1])", None),
        ("aten.permute.default(self=%x, dims=[0, 1, 2])", None),
        ("aten.sum.dim_IntList(self=%x, dim=[-1], keepdim=True)", "aten.sum.dim_IntList(self=%x, dim=[2], keepdim=True)"),
        ("aten.softmax.int(self=%x, dim=-1)", "aten.softmax.int(self=%x, dim=2)"),
        ("aten.view.default(self=%x, size=[-1, 8])", "aten.reshape.default(self=%x, shape=[batch*sequence, 8])"),
        ("aten.flatten.using_ints(self=%x, end_dim=1)", "aten.reshape.default(self=%x, shape=[batch*sequence, 8])"),
        ("aten.permute.default(self=%x, dims=[1, 0, 2])", "aten.transpose.int(self=%x, dim0=0, dim1=1)"),
        ("aten.transpose.int(self=%x, dim0=-1, dim1=0)", "aten.transpose.int(self=%x, dim0=0, dim1=2)"),
        ("aten.slice.Tensor(self=%x, dim=-1, start=2)", "aten.slice.Tensor(self=%x, dim=2, start=2, end=8)"),
        ("aten.slice.Tensor(self=%x, dim=2, end=-3)", "aten.slice.Tensor(self=%x, dim=2, start=0, end=5)"),
        ("aten.zeros_like.default(self=%x)",
         "aten.full.default(size=[batch, sequence, 8], fill_value=0, dtype=f32)"),
        ("aten.to.dtype(self=%x, dtype=f64)", "aten.to.dtype(self=%x, dtype=f64)"),
    ],
)  # fmt: skip
def test_one_spelling(spelling: str, normal: str | None) -> None:
    before = FLOATS + f"%y: {type_of(spelling)} = {spelling}\noutput y = %y"
    after = UNCHANGED if normal is None else FLOATS + f"%y: {type_of(spelling)} = {normal}\noutput y = %y"
    applied = apply_pass(before, Canonicalize(allow_no_match=True))
    assert applied.text == program(after)
    assert applied.matches == ({"no-op": 1} if normal is None else {"spelling": 1} if spelling != normal else {})
    assert_equal_runs(program(before), program(after))


def type_of(call: str) -> str:
    """The type that torch derives for a call on ``x``."""
    name, _, rest = call.partition("(")
    args = parse(program(f"{FLOATS}%y: f32[1] = {name}({rest}")).value("y").producer
    assert args is not None
    graph = parse(program(FLOATS))
    inferred = {key: graph.value("x") if key in ("self", "input") else arg for key, arg in args.args.items()}
    return str(graph.insert(name, inferred).output.type)


def test_a_dropout_that_trains_stays() -> None:
    body = unary("aten.dropout.default(input=%x, p=0.5, train=True)")
    assert apply_pass(body, Canonicalize(allow_no_match=True)).text == program(body)


# Constants


def test_constants_are_folded_through() -> None:
    body = f"""{FLOATS}
        weight %a: f32[8]
        weight %b: f32[8]
        %sum: f32[8] = aten.add.Tensor(self=%a, other=%b)
        %twice: f32[8] = aten.mul.Tensor(self=%sum, other=2)
        %y: f32[batch, sequence, 8] = aten.mul.Tensor(self=%x, other=%twice)
        output y = %y"""
    graph = read(body)
    applied = pass_on(graph, Canonicalize())
    assert applied.text == program(f"""{FLOATS}
        weight %twice: f32[8]
        %y: f32[batch, sequence, 8] = aten.mul.Tensor(self=%x, other=%twice)
        output y = %y""")
    assert applied.matches == {"constant": 2}
    before = read(body)
    a, b = (before.weights[name].load() for name in ("a", "b"))
    torch.testing.assert_close(graph.weights["twice"].load(), (a + b) * 2)
    assert_computes(program(body), lambda x, a, b: x * (a + b) * 2)


def test_a_constant_output_is_folded() -> None:
    body = f"{FLOATS}weight %a: f32[8]\n%b: f32[8] = aten.neg.default(self=%a)\noutput y = %b\noutput x = %x"
    after = f"{FLOATS}weight %b: f32[8]\noutput y = %b\noutput x = %x"
    assert apply_pass(body, Canonicalize()).text == program(after)


def expanded(size: int, fold_bytes: int) -> int:
    """How many constants are folded where 8 numbers become ``size`` times 8."""
    body = f"""{FLOATS}
        weight %a: f32[8]
        %wide: f32[{size}, 8] = aten.expand.default(self=%a, size=[{size}, 8])
        output y = %wide
        output x = %x"""
    step = Canonicalize(fold_bytes=fold_bytes, allow_no_match=True)
    return apply_pass(body, step).matches.get("constant", 0)


def test_a_constant_is_folded_up_to_the_limit() -> None:
    assert expanded(4, fold_bytes=4 * 8 * 4) == 1
    assert expanded(4, fold_bytes=4 * 8 * 4 - 1) == 0


def test_a_constant_no_larger_than_its_operands_is_folded_beyond_the_limit() -> None:
    body = f"{FLOATS}weight %a: f32[8]\n%b: f32[8] = aten.neg.default(self=%a)\noutput y = %b\noutput x = %x"
    assert apply_pass(body, Canonicalize(fold_bytes=0)).matches == {"constant": 1}
    assert expanded(1, fold_bytes=0) == 1
    assert expanded(2, fold_bytes=0) == 0


@pytest.mark.parametrize(
    "line",
    [
        "%y: f32[sequence, 8] = aten.expand.default(self=%a, size=[sequence, 8])",
        "%y: f32[batch, sequence, 8] = aten.mul.Tensor(self=%x, other=%a)",
        "%y: i64[sequence] = aten.arange.start_step(start=0, end=sequence, dtype=i64)",
    ],
)
def test_what_depends_on_inputs_or_sizes_is_no_constant(line: str) -> None:
    body = f"{FLOATS}weight %a: f32[8]\n{line}\noutput y = %y\noutput a = %a"
    assert apply_pass(body, Canonicalize(allow_no_match=True)).text == program(body)


def test_a_folded_weight_is_computed_when_it_is_loaded() -> None:
    body = f"{FLOATS}weight %a: f32[8]\n%b: f32[8] = aten.neg.default(self=%a)\noutput y = %b\noutput x = %x"
    loads: list[str] = []

    def counted() -> torch.Tensor:
        loads.append("a")
        return original.load()

    graph = read(body)
    original = graph.weights["a"]
    graph.weights["a"] = Weight(original.type, counted)
    run_passes(graph, [Canonicalize()])
    assert loads == []
    torch.testing.assert_close(graph.weights["b"].load(), -original.load())
    assert loads == ["a"]


def test_a_folded_weight_follows_its_file(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(8)}, file)
    graph = Graph()
    a = graph.add_weight("a", Weight.from_safetensors(str(file), "a"))
    graph.outputs["y"] = graph.insert("aten.neg.default", {"self": a}, names=["b"]).output
    run_passes(graph, [Canonicalize()])
    save_file({"a": torch.full((8,), 3.0)}, file)
    torch.testing.assert_close(graph.weights["b"].load(), torch.full((8,), -3.0))


# Equal sub-graphs and dead nodes


def test_equal_nodes_are_shared() -> None:
    body = f"""{FLOATS}
        %a: f32[batch, sequence, 8] = aten.exp.default(self=%x)
        %b: f32[batch, sequence, 8] = aten.exp.default(self=%x)
        %c: f32[batch, sequence, 8] = aten.neg.default(self=%a)
        %d: f32[batch, sequence, 8] = aten.neg.default(self=%b)
        %y: f32[batch, sequence, 8] = aten.add.Tensor(self=%c, other=%d)
        output y = %y
        output d = %d"""
    applied = apply_pass(body, Canonicalize())
    assert applied.text == program(f"""{FLOATS}
        %a: f32[batch, sequence, 8] = aten.exp.default(self=%x)
        %c: f32[batch, sequence, 8] = aten.neg.default(self=%a)
        %y: f32[batch, sequence, 8] = aten.add.Tensor(self=%c, other=%c)
        output y = %y
        output d = %c""")
    assert applied.matches == {"duplicate": 2}
    assert_equal_runs(program(body), applied.text)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("aten.add.Tensor(self=%x, other=1)", "aten.add.Tensor(self=%x, other=1, alpha=2)"),
        ("aten.add.Tensor(self=%x, other=2)", "aten.add.Tensor(self=%x, other=2.0)"),
        ("aten.neg.default(self=%x)", "aten.exp.default(self=%x)"),
        ("aten.neg.default(self=%x)", "aten.neg.default(self=%z)"),
        ("aten.sub.Tensor(self=%x, other=%z)", "aten.sub.Tensor(self=%z, other=%x)"),
    ],
)
def test_nodes_that_differ_are_not_shared(first: str, second: str) -> None:
    body = f"""{FLOATS}
        input %z: f32[batch, sequence, 8]
        %a: f32[batch, sequence, 8] = {first}
        %b: f32[batch, sequence, 8] = {second}
        output a = %a
        output b = %b"""
    assert apply_pass(body, Canonicalize(allow_no_match=True)).text == program(body)


def test_random_numbers_are_not_shared() -> None:
    body = f"""{FLOATS}
        %a: f32[batch, sequence, 8] = aten.dropout.default(input=%x, p=0.5, train=True)
        %b: f32[batch, sequence, 8] = aten.dropout.default(input=%x, p=0.5, train=True)
        output a = %a
        output b = %b"""
    assert apply_pass(body, Canonicalize(allow_no_match=True)).text == program(body)


def test_dead_nodes_and_weights_go() -> None:
    body = f"""{FLOATS}
        weight %w: f32[8]
        %a: f32[batch, sequence, 8] = aten.exp.default(self=%x)
        %b: f32[batch, sequence, 8] = aten.mul.Tensor(self=%a, other=%w)
        output y = %x"""
    applied = apply_pass(body, Canonicalize())
    assert applied.text == program(UNCHANGED)
    assert applied.matches == {"dead": 2}


# The pass


EVERYTHING = f"""{FLOATS}
    weight %a: f32[8]
    weight %c: f32[]
    %zero: f32[batch, sequence, 8] = aten.add.Tensor(self=%x, other=0)
    %sum: f32[8] = aten.add.Tensor(self=%a, other=%a)
    %v: f32[batch, 2*sequence, 4] = aten.view.default(self=%zero, size=[batch, -1, 4])
    %w: f32[batch, sequence, 8] = aten.view.default(self=%v, size=[batch, sequence, 8])
    %z: f32[batch, sequence, 8] = aten.mul.Tensor(self=%w, other=%c)
    %scaled: f32[batch, sequence, 8] = aten.mul.Tensor(self=%z, other=%sum)
    %again: f32[batch, sequence, 8] = aten.mul.Tensor(self=%z, other=%sum)
    %y: f32[batch, sequence, 8] = aten.sub.Tensor(self=%scaled, other=%again, alpha=3)
    %dead: f32[batch, sequence, 8] = aten.neg.default(self=%y)
    output y = %y"""


def test_everything_at_once() -> None:
    applied = apply_pass(EVERYTHING, Canonicalize())
    assert applied.text == program(f"""{FLOATS}
        weight %sum: f32[8]
        %z: f32[batch, sequence, 8] = aten.mul.Tensor(self=%x, other=0.9178138971328735)
        %scaled: f32[batch, sequence, 8] = aten.mul.Tensor(self=%z, other=%sum)
        %y: f32[batch, sequence, 8] = aten.sub.Tensor(self=%scaled, other=%scaled, alpha=3)
        output y = %y""")
    assert applied.matches == {
        "spelling": 2, "DropAddZero": 1, "MergeReshapes": 1, "NumberOperand": 1, "constant": 1, "duplicate": 1, "dead": 1,
    }  # fmt: skip


def test_everything_at_once_is_equal() -> None:
    graph = read(EVERYTHING)
    pass_on(graph, Canonicalize())
    assert_computes(program(EVERYTHING), lambda x, a, c: -2 * x * c * (a + a))
    sizes = {"batch": 3, "sequence": 7}
    inputs = inputs_of(graph, sizes)
    torch.testing.assert_close(run(graph, inputs)["y"], run_text(program(EVERYTHING), sizes)["y"])


@pytest.mark.parametrize("body", [EVERYTHING, *(case.before for case in CASES)])
def test_idempotent(body: str) -> None:
    assert_idempotent(body, Canonicalize())


def test_a_pass_that_changes_nothing_is_an_error() -> None:
    body = unary("aten.exp.default(self=%x)")
    with pytest.raises(NoMatchError, match="canonicalize changed nothing"):
        apply_pass(body, Canonicalize())
    assert apply_pass(body, Canonicalize(allow_no_match=True)).text == program(body)


def test_origins_name_the_rewrite() -> None:
    graph = read(RESHAPED)
    before = graph.value("b").producer
    assert before is not None
    before.origin = ("model.layer",)
    pass_on(graph, Canonicalize())
    after = graph.value("b").producer
    assert after is not None
    assert after.origin == ("model.layer", "canonicalize")


def test_rules_work_together() -> None:
    body = f"""{FLOATS}
        %a: f32[batch, sequence, 8] = aten.mul.Tensor(self=%x, other=1)
        %b: f32[batch, sequence, 8] = aten.add.Tensor(self=%a, other=0)
        output y = %b"""
    applied = apply(body, DropAddZero(), DropMulOne())
    assert applied.text == program(UNCHANGED)
    assert applied.matches == {"DropMulOne": 1, "DropAddZero": 1}
