"""Rotary embeddings: halves and neighbours, every layout of angles; what is refused, and why."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphopt.ir import Graph
from graphopt.passes.rotary import FuseRotary, are_equal
from graphopt.tensors import Weight
from tests.rules import (
    DIMS,
    apply,
    assert_becomes,
    assert_computes,
    assert_equal_runs,
    assert_not_matched,
    assert_refuses,
    lines,
    program,
    read,
)

X = f"{DIMS}input %x: f32[batch, 4, sequence, 8]\n"
LAST = f"{DIMS}input %x: f32[batch, sequence, 4, 8]\n"


COS_SIN = lines("cos = cos.default(self=%angle)", "sin = sin.default(self=%angle)")


def turn(pairing: str = "halves", cos: str = "%cos", sin: str = "%sin", shape: str = "batch, 4, sequence, 8") -> str:
    """``x * cos + turned(x) * sin``."""
    a, b = (
        ("start=0, end=4", "start=4, end=8")
        if pairing == "halves"
        else ("start=0, end=8, step=2", "start=1, end=8, step=2")
    )
    joined = {
        "halves": ["h = cat.default(tensors=[%n, %x1], dim=3)"],
        "neighbours": [
            "st = stack.default(tensors=[%n, %x1], dim=4)",
            f"h = reshape.default(self=%st, shape=[{shape}])",
        ],
    }
    return lines(
        f"x1 = slice.Tensor(self=%x, dim=3, {a})",
        f"x2 = slice.Tensor(self=%x, dim=3, {b})",
        "n = neg.default(self=%x2)",
        *joined[pairing],
        f"xc = mul.Tensor(self=%x, other={cos})",
        f"hs = mul.Tensor(self=%h, other={sin})",
        "o = add.Tensor(self=%xc, other=%hs)",
    ) + "output y = %o\n"  # fmt: skip


def rotary(*made: str, x: str = "%x", args: str = "") -> str:
    """Lines, then the one op that turns ``x`` by the last two of them."""
    cos, sin = (line.split(" ", maxsplit=1)[0] for line in made[-2:])
    call = f"%o = graphopt.rotary_embedding.default(x={x}, cos=%{cos}, sin=%{sin}{args})"
    return f"{lines(*made)}{call}\noutput y = %o"


INTERLEAVED, HEADS_LAST = ", interleaved=True", ", heads_last=True"


def doubled(shape: str, of: str = X) -> str:
    """Angles of ``shape``, each feature twice: first all, then all again."""
    axis = shape.count(",")
    return f"{of}input %f: f32[{shape}, 4]\n{lines(f'angle = cat.default(tensors=[%f, %f], dim={axis + 1})')}{COS_SIN}"


def halved(shape: str, to: str) -> list[str]:
    """The first half of the angles, ``[B or 1, S, 4]``."""
    axis = shape.count(",") + 1
    return [
        f"c = slice.Tensor(self=%cos, dim={axis}, start=0, end=4)",
        f"s = slice.Tensor(self=%sin, dim={axis}, start=0, end=4)",
        f"c3 = reshape.default(self=%c, shape=[{to}, 4])",
        f"s3 = reshape.default(self=%s, shape=[{to}, 4])",
    ]


@pytest.mark.parametrize(
    ("x", "shape", "to", "args"),
    [
        (X, "batch, 1, sequence", "batch, sequence", ""),
        (X, "1, 1, sequence", "1, sequence", ""),
        (X, "1, sequence", "1, sequence", ""),
        (X, "sequence", "1, sequence", ""),
        (LAST, "batch, sequence, 1", "batch, sequence", HEADS_LAST),
        (LAST, "1, sequence, 1", "1, sequence", HEADS_LAST),
        (LAST, "sequence, 1", "1, sequence", HEADS_LAST),
    ],
)
def test_halves_turn_by_angles_of_any_layout(x: str, shape: str, to: str, args: str) -> None:
    after = doubled(shape, x) + rotary(*halved(shape, to), args=args)
    assert_becomes(doubled(shape, x) + turn(), after, [FuseRotary()])


BOTH_ORDERS = (
    turn().replace("self=%xc, other=%hs", "self=%hs, other=%xc").replace("self=%x, other=%cos", "self=%cos, other=%x")
)


def test_operands_match_in_either_order() -> None:
    after = doubled("sequence") + rotary(*halved("sequence", "1, sequence"))
    assert_becomes(doubled("sequence") + BOTH_ORDERS, after, [FuseRotary()])


TWICE = {
    "repeat_interleave": ["angle = repeat_interleave.self_int(self=%f, repeats=2, dim=1)"],
    "stack": [
        "st2 = stack.default(tensors=[%f, %f], dim=2)",
        "angle = reshape.default(self=%st2, shape=[sequence, 8])",
    ],
}
EVERY_SECOND = [
    "c = slice.Tensor(self=%cos, dim=1, start=0, end=8, step=2)",
    "s = slice.Tensor(self=%sin, dim=1, start=0, end=8, step=2)",
    "c3 = reshape.default(self=%c, shape=[1, sequence, 4])",
    "s3 = reshape.default(self=%s, shape=[1, sequence, 4])",
]


@pytest.mark.parametrize("angles", list(TWICE))
def test_neighbours_turn(angles: str) -> None:
    head = f"{X}input %f: f32[sequence, 4]\n{lines(*TWICE[angles])}{COS_SIN}"
    after = head + rotary(*EVERY_SECOND, args=INTERLEAVED)
    assert_becomes(head + turn("neighbours"), after, [FuseRotary()])


def test_rotary_computes_rotation() -> None:
    def formula(x: Tensor, f: Tensor) -> Tensor:
        turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(f), f)
        return torch.cat([turned.real, turned.imag], -1)

    applied = apply(doubled("sequence") + turn(), FuseRotary())
    assert applied.matches == {"FuseRotary": 1}
    assert_computes(applied.text, formula)


def test_two_tensors_are_turned_by_one_pair_of_slices() -> None:
    second = turn()
    for name in ("x1", "x2", "n", "h", "xc", "hs", "o"):
        second = second.replace(f"%{name} ", f"%z{name} ").replace(f"%{name},", f"%z{name},")
        second = second.replace(f"%{name})", f"%z{name})").replace(f"%{name}]", f"%z{name}]")
    second = second.replace("self=%x,", "self=%z,").replace("output y = %o", "output z = %zo")
    head = doubled("sequence", f"{X}input %z: f32[batch, 4, sequence, 8]\n")
    body = head + turn().replace("output y = %o\n", "") + second + "output y = %o"
    applied = apply(body, FuseRotary())
    assert applied.matches == {"FuseRotary": 2}
    assert applied.text.count("aten.slice.Tensor") == 2
    assert_equal_runs(program(body), applied.text)


# Angles whose pairs are equal


def angle(*calls: str, of: str = "sequence, 4") -> str:
    return f"{X}input %f: f32[{of}]\n{lines(*calls)}"


DOUBLE = "d = cat.default(tensors=[%f, %f], dim=1)"
PLACE = "i = arange.start_step(start=0, end=sequence, dtype=i64)"
EQUAL = {
    "cat": angle("y = cat.default(tensors=[%f, %f], dim=1)"),
    "tile": angle("y = tile.default(self=%f, dims=[2])"),
    "tile, all axes": angle("y = tile.default(self=%f, dims=[1, 2])"),
    "computed": angle(DOUBLE, "c = cos.default(self=%d)", "m = mul.Tensor(self=%c, other=0.5)", "y = neg.default(self=%m)"),
    "cast": angle(DOUBLE, "y = to.dtype(self=%d, dtype=f64)"),
    "sum of two": angle(DOUBLE, "e = sin.default(self=%d)", "y = add.Tensor(self=%d, other=%e)"),
    "scaled by rows": angle(DOUBLE, "r = sum.dim_IntList(self=%f, dim=[1], keepdim=True)", "y = mul.Tensor(self=%d, other=%r)"),
    "unsqueeze": angle(DOUBLE, "y = unsqueeze.default(self=%d, dim=0)"),
    "expand": angle(DOUBLE, "u = unsqueeze.default(self=%d, dim=0)", "y = expand.default(self=%u, size=[batch, sequence, 8])"),
    "rows of a slice": angle(DOUBLE, "y = slice.Tensor(self=%d, start=0, end=1)"),
    "a row": angle(DOUBLE, "u = unsqueeze.default(self=%d, dim=0)", "y = select.int(self=%u, dim=0, index=0)"),
    "transpose": angle(DOUBLE, "u = unsqueeze.default(self=%d, dim=0)", "y = transpose.int(self=%u, dim0=0, dim1=1)"),
    "reshape": angle(DOUBLE, "y = reshape.default(self=%d, shape=[1, 1, sequence, 8])"),
    "rows": angle(DOUBLE, PLACE, "y = index.Tensor(self=%d, indices=[%i])"),
    "embedding": angle(DOUBLE, PLACE, "y = embedding.default(weight=%d, indices=%i)"),
}  # fmt: skip


@pytest.mark.parametrize("body", EQUAL.values(), ids=list(EQUAL))
def test_halves_are_shown_to_be_equal(body: str) -> None:
    graph = read(body + "output y = %y")
    assert are_equal(graph, graph.value("y"), "halves")
    assert not are_equal(graph, graph.value("y"), "neighbours")


NOT_EQUAL = {
    "an input": angle("y = neg.default(self=%f)", of="sequence, 8"),
    "two tensors": angle("e = neg.default(self=%f)", "y = cat.default(tensors=[%f, %e], dim=1)"),
    "three times": angle("y = cat.default(tensors=[%f, %f, %f], dim=1)"),
    "rows twice": angle("y = cat.default(tensors=[%f, %f])"),
    "scaled by features": angle(DOUBLE, "y = mul.Tensor(self=%d, other=%g)").replace(
        "input %f", "input %g: f32[8]\ninput %f"
    ),
    "some features": angle(DOUBLE, "y = slice.Tensor(self=%d, dim=1, start=1, end=8)"),
    "turned to rows": angle(DOUBLE, "y = transpose.int(self=%d, dim0=0, dim1=1)"),
    "regrouped": angle(DOUBLE, "y = reshape.default(self=%d, shape=[2*sequence, 4])"),
    "tiled rows": angle("y = tile.default(self=%f, dims=[2, 1])"),
    "softmax": angle(DOUBLE, "y = softmax.int(self=%d, dim=1)"),
}


@pytest.mark.parametrize("body", NOT_EQUAL.values(), ids=list(NOT_EQUAL))
def test_what_is_not_shown_to_be_equal(body: str) -> None:
    graph = read(body + "output y = %y")
    assert not are_equal(graph, graph.value("y"), "halves")
    assert not are_equal(graph, graph.value("y"), "neighbours")


def columns(picked: list[int]) -> Tensor:
    return torch.arange(12.0).reshape(3, 4)[:, picked]


@pytest.mark.parametrize(
    ("data", "pairings"),
    [
        (columns([0, 1, 0, 1]), {"halves"}),
        (columns([0, 0, 1, 1]), {"neighbours"}),
        (columns([0, 0, 0, 0]), {"halves", "neighbours"}),
        (columns([0, 1, 2, 3]), set()),
        (columns([0, 1, 0]), set()),
        (torch.tensor(1.0), set()),
    ],
)
def test_tables_are_looked_at(data: Tensor, pairings: set[str]) -> None:
    graph = Graph()
    value = graph.add_weight("table", Weight.of(data))
    assert {pairing for pairing in ("halves", "neighbours") if are_equal(graph, value, pairing)} == pairings
    assert not are_equal(None, value, "halves")


# What is refused


GIVEN = f"{X}input %cos: f32[sequence, 8]\ninput %sin: f32[sequence, 8]\n"
GIVEN_SINE = doubled("sequence", f"{X}input %sine: f32[sequence, 8]\n")
OTHER_X = doubled("sequence", f"{X}input %z: f32[batch, 4, sequence, 8]\n")


def unequal(name: str, pairing: str = "halves") -> str:
    return f"the two {pairing} of {name} (%{name}) are not shown to be equal"


def misfit(name: str, type: str) -> str:
    return f"{name} is {type}, not one angle for each position and pair"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (GIVEN + turn(), unequal("cos")),
        (GIVEN_SINE + turn(sin="%sine"), unequal("sin").replace("(%sin)", "(%sine)")),
        (doubled("sequence") + turn("neighbours"), unequal("cos", "neighbours")),
        (GIVEN.replace("%cos: f32[sequence, 8]", "%cos: f32[sequence, 1]") + turn(), "cos is not of 8 features"),
        (GIVEN.replace("f32[sequence, 8]", "f32[]") + turn(), "cos is not of 8 features"),
        (
            doubled("sequence") + turn().replace("end=4", "end=3").replace("start=4", "start=3"),
            "what is turned are not parts of x",
        ),
        (
            OTHER_X + turn().replace("x2 = aten.slice.Tensor(self=%x", "x2 = aten.slice.Tensor(self=%z"),
            "what is turned are not parts of x",
        ),
        (OTHER_X + turn().replace("mul.Tensor(self=%x,", "mul.Tensor(self=%z,"), "what is turned are not parts of x"),
        (doubled("batch, 4, sequence") + turn(), misfit("cos", "f32[batch, 4, sequence, 4]")),
        (doubled("1") + turn(), misfit("cos", "f32[1, 4]")),
        (doubled("sequence").replace("%f: f32", "%f: f64") + turn(), "x, cos and sin differ in dtype"),
        (doubled("sequence") + turn() + "output h = %h", "%h (aten.cat.default) is also used by an output"),
    ],
)  # fmt: skip
def test_refuses(body: str, reason: str) -> None:
    assert_refuses(body, FuseRotary(), reason)


def test_three_axes_do_not_match() -> None:
    body = doubled("sequence", f"{DIMS}input %x: f32[batch, sequence, 8]\n") + turn().replace("dim=3", "dim=2")
    assert_not_matched(body, FuseRotary())
